"""OpenAI's improved-diffusion and guided-diffusion (ADM): networks, and the flags they come with.

These projects have no YAML. A config for them is a bare `target:` with `params:`, either a network
(`guided_diffusion.unet.UNetModel`) or the function that makes one from the published flags
(`guided_diffusion.script_util.create_model_and_diffusion`). With the flags of the diffusion, for a network
in a section `diffusion:` beside it, it becomes a `LatentDiffusion` over pixels, which can be sampled.

Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672), Dhariwal & Nichol 2021
(https://arxiv.org/abs/2105.05233).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ldm.checkpoints.description import node
from ldm.checkpoints.originals import compvis
from ldm.checkpoints.originals.original_yaml import Part, Reading, Translated
from ldm.config.signatures import parameters
from ldm.models.encoder_unet import EncoderUNetModel

NUM_CLASSES = 1000  # of ImageNet: `class_cond` has no other
TRAINING = ("use_kl", "rescale_learned_sigmas")  # the loss
# Names of the schedules of betas: theirs, ours.
BETAS = {"linear": "sqrt_linear", "cosine": "cosine"}
# Levels by image size where `channel_mult` is not given: of the UNet, of its smaller 32-pixel version, ...
MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
SUPER_RES_MULTIPLIERS = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}


# Networks


def unet(part: Part) -> Translated:
    return compvis.unet(part, num_heads=1)


def super_res(part: Part) -> Translated:
    return Translated(node("models.encoder_unet.SuperResModel", **unet(part).node["params"]))


def classifier(part: Part) -> Translated:
    part.only("dims", (2,), "only images are supported")
    given = [name for name in parameters(EncoderUNetModel) if name != "use_fp16"]
    ignored = ("use_fp16", "num_heads_upsample")  # there is no upsampling
    return Translated(part.node("models.encoder_unet.EncoderUNetModel", *given, ignored=ignored))


# The published flags


def _flags(part: Part, size_name: str) -> tuple[int, dict[str, Any]]:
    """(image size, arguments of the UNet) from the flags that all of the functions share."""
    levels = MULTIPLIERS if size_name == "image_size" else SUPER_RES_MULTIPLIERS
    given = part.take("channel_mult", "") if size_name == "image_size" else ""
    size, multipliers = _size(part, size_name, levels, _numbers(given) if given != "" else None)
    sides = _numbers(part.take("attention_resolutions", "16,8"))
    params = {
        "in_channels": 3,
        "model_channels": part.take("num_channels", 128),
        "out_channels": 6 if part.take("learn_sigma", False) else 3,
        "num_res_blocks": part.take("num_res_blocks", 2),
        "attention_resolutions": [size // side for side in sides],
        "channel_mult": multipliers,
        "num_heads": part.take("num_heads", 4),
        "use_scale_shift_norm": part.take("use_scale_shift_norm", True),
    }
    if part.take("class_cond", False):
        params["num_classes"] = NUM_CLASSES
    optional = ("num_head_channels", "num_heads_upsample", "dropout", "use_checkpoint", "resblock_updown")
    return size, params | part.given(*optional, "use_new_attention_order")


def _size(part: Part, name: str, levels: dict, given: list | None = None) -> tuple[int, list]:
    """(image size, its channel multipliers), these as given or as published."""
    size = part.take(name, 64)
    if given is None and size not in levels:
        part.problem(name, f"{size} has no channel_mult (there are: {', '.join(map(str, levels))})")
        part.reading.check()
    return size, list(levels[size]) if given is None else given


def _numbers(value: Any) -> list[int]:
    """ "32,16,8", one number, or a list of numbers."""
    if isinstance(value, str):
        value = value.split(",")
    return [int(number) for number in ([value] if isinstance(value, int) else value)]


# The section `diffusion:` with its defaults, and the flags that have longer names in the projects.
_DIFFUSION = {
    "timesteps": 1000,
    "beta_schedule": "linear",
    "respacing": "",
    "predict_xstart": False,
    "rescale_timesteps": False,
    "sigma_small": False,
    "learn_sigma": False,
}
_FLAGS = {
    "diffusion_steps": "timesteps",
    "noise_schedule": "beta_schedule",
    "timestep_respacing": "respacing",
}


def from_flags(
    part: Part,
    target: str = "models.unet.UNetModel",
    size_name: str = "image_size",
    diffused: bool = True,
    ignored: tuple = (),
) -> Translated:
    diffusion = {}
    if diffused:
        alike = ("predict_xstart", "rescale_timesteps", "sigma_small")
        # The default of improved-diffusion, unlike guided-diffusion's.
        diffusion = {"rescale_timesteps": True} if part.target.startswith("improved_diffusion.") else {}
        diffusion |= part.given(*_FLAGS, *alike, *TRAINING)
        diffusion["learn_sigma"] = bool(part.params.get("learn_sigma", False))
    size, params = _flags(part, size_name)
    part.finish("use_fp16", *ignored)
    network = node(target, **params)
    if not diffused:
        return Translated(network)
    return with_diffusion(network, diffusion, size, part.place(), part.reading)


def create_classifier(part: Part) -> Translated:
    size, multipliers = _size(part, "image_size", MULTIPLIERS)
    resolutions = _numbers(part.take("classifier_attention_resolutions", "32,16,8"))
    params = {
        "image_size": size,
        "in_channels": 3,
        "model_channels": part.take("classifier_width", 128),
        "out_channels": NUM_CLASSES,
        "num_res_blocks": part.take("classifier_depth", 2),
        "attention_resolutions": [size // resolution for resolution in resolutions],
        "channel_mult": multipliers,
        "num_head_channels": 64,
        "use_scale_shift_norm": part.take("classifier_use_scale_shift_norm", True),
        "resblock_updown": part.take("classifier_resblock_updown", True),
        "pool": part.take("classifier_pool", "attention"),
    }
    part.finish("classifier_use_fp16")
    return Translated(node("models.encoder_unet.EncoderUNetModel", **params))


# The diffusion


def with_diffusion(network: dict, diffusion: dict, size: int, path: str, reading: Reading) -> Translated:
    """A network as a `LatentDiffusion` over pixels; its file still has the bare network's names."""
    path = f"{path}.diffusion" if path else "diffusion"
    flags = _diffusion_of(diffusion, path, reading)
    learned, respacing = bool(flags["learn_sigma"]), str(flags["respacing"])
    ddim = "leading" if respacing.startswith("ddim") or not respacing else "respaced"
    variance = "learned" if learned else "small" if flags["sigma_small"] else "large"
    params, embedders = network["params"], []
    if (classes := params.get("num_classes")) is not None:
        embedders.append(node("conditioning.vectors.Labels", num_classes=classes, key="label", also=["y"]))
    if network["target"].endswith(".SuperResModel"):  # its condition is an image beside the noisy one
        embedders.append(node("conditioning.maps.ImageMap", key="low_res", size=size))
        network = node("models.unet.UNetModel", **params | {"in_channels": 2 * params["in_channels"]})
    whole = node(
        "latent_diffusion.LatentDiffusion",
        first_stage=compvis.pixels(params["out_channels"] // (2 if learned else 1)),
        network=network,
        denoiser=node(
            "diffusion.denoiser.Denoiser",
            prediction="x0" if flags["predict_xstart"] else "eps",
            learned_variance=learned,
            schedule=_schedule(flags, path, reading),
        ),
        conditioner=node("conditioning.Conditioner", embedders=embedders),
        image_size=size,
        clip_x0=True,
        sampler_defaults={"ddim": {"spacing": ddim}, "ddpm": {"spacing": "respaced", "variance": variance}},
    )
    return Translated(whole, lambda model: model.network)


def _schedule(flags: dict, path: str, reading: Reading) -> dict:
    steps, name = flags["timesteps"], flags["beta_schedule"]
    schedule = {"timesteps": steps, "schedule": BETAS.get(name, "cosine")}
    if name not in BETAS:
        reading.problem(f"{path}.beta_schedule", f"{name!r} is none of {', '.join(BETAS)}")
    elif name == "linear":  # scaled so that any number of steps ends in the same noise
        schedule |= {"linear_start": 1e-4 * 1000 / steps, "linear_end": 2e-2 * 1000 / steps}
    if flags["rescale_timesteps"] and steps != 1000:
        reading.problem(f"{path}.rescale_timesteps", f"is not supported with {steps} steps, only with 1000")
    return node("diffusion.schedule.DiscreteSchedule", **schedule)


def _diffusion_of(given: dict, path: str, reading: Reading) -> dict[str, Any]:
    """The section `diffusion:`, all of it, by the shorter names."""
    flags = dict(given)
    for flag, name in _FLAGS.items():
        if flag in flags:
            if name in flags:
                reading.problem(f"{path}.{name}", f"is also given as {flag}")
            flags[name] = flags.pop(flag)
    known = ", ".join((*_DIFFUSION, *_FLAGS, *TRAINING))
    for name in [name for name in flags if name not in (*_DIFFUSION, *TRAINING)]:
        reading.problem(f"{path}.{name}", f"unknown (known: {known})")
    return _DIFFUSION | flags


NETWORKS: dict[str, Callable[[Part], Translated]] = {
    "guided_diffusion.unet.UNetModel": unet,
    "guided_diffusion.unet.SuperResModel": super_res,
    "guided_diffusion.unet.EncoderUNetModel": classifier,
    "improved_diffusion.unet.UNetModel": unet,
    "improved_diffusion.unet.SuperResModel": super_res,
    "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel": classifier,
}
_create_model = partial(from_flags, diffused=False)
_super_res_from_flags = partial(
    from_flags,
    target="models.encoder_unet.SuperResModel",
    size_name="large_size",
    ignored=("small_size",),  # any low resolution is taken
)
MODELS: dict[str, Callable[[Part], Translated]] = {
    **NETWORKS,
    "guided_diffusion.script_util.create_model": _create_model,
    "guided_diffusion.script_util.create_model_and_diffusion": from_flags,
    "guided_diffusion.script_util.create_classifier": create_classifier,
    "guided_diffusion.script_util.sr_create_model_and_diffusion": _super_res_from_flags,
    "improved_diffusion.script_util.create_model": _create_model,
    "improved_diffusion.script_util.create_model_and_diffusion": from_flags,
}


def network(part: Part, diffusion: dict | None) -> Translated:
    """A network of OpenAI's, with its section `diffusion` or without."""
    translate = part.translator(MODELS, "network of OpenAI's")
    size = part.params.get("image_size")
    found = translate(part)
    if diffusion is None:
        return found
    if part.target not in NETWORKS or translate is classifier:
        part.reading.problem("diffusion", f"does not go with {part.target}")
        return found
    if size is None:
        part.problem("image_size", "is needed with a section `diffusion`")
        return found
    return with_diffusion(found.node, diffusion, size, "", part.reading)
