"""Stability-AI/generative-models (sgm): its YAMLs in our terms. Stable Diffusion 2.x, SDXL base and refiner.

Target names, parameters and their defaults are facts of that repository; Podell et al. 2023
(https://arxiv.org/abs/2307.01952).
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ldm.checkpoints.originals import compvis, compvis_conditions
from ldm.checkpoints.originals.compvis import latent_sizes
from ldm.checkpoints.originals.original_yaml import Part
from ldm.checkpoints.originals.sgm_first_stages import FIRST_STAGES
from ldm.checkpoints.originals.translation import Shell, Translated, lookup, take_given

ENGINE_TRAINING = {
    "optimizer_config": "training",
    "scheduler_config": "the learning rate's schedule",
    "loss_fn_config": "the loss",
    "ckpt_path": "the weights come from the checkpoint that is loaded",
    "use_ema": "whether there are averaged weights is seen in the checkpoint",
    "ema_decay_rate": "training",
    "disable_first_stage_autocast": "the type is chosen when the model is loaded",
    "input_key": "the batch key of training",
    "log_keys": "logging",
    "no_cond_log": "logging",
    "compile_model": "chosen when the model is loaded",
    "en_and_decode_n_samples_a_time": "how many images are decoded at a time",
}
_LOSS = {"weighting_config": "the loss"}


# Network


def unet(part: Part) -> Translated:
    """sgm's UNet has SpatialTransformers everywhere, with or without a context."""
    part.ignore({"offload_to_cpu": "training", "use_fairscale_checkpoint": "training"})
    return compvis.unet(part, use_spatial_transformer=True)


NETWORKS = {"sgm.modules.diffusionmodules.openaimodel.UNetModel": unet}


# Conditions


def class_embedder(part: Part, key: str, kind: str) -> dict:
    params = {
        "num_classes": part.take("n_classes", 1000),
        "dim": part.take("embed_dim"),
        "kind": "crossattn" if part.take("add_sequence_dim", False) else "vector",
        "key": "label",
        "also": [key] if key != "label" else [],
        "absent": "zeros",
    }
    part.finish()
    return {"target": "ldm.conditioning.vectors.ClassFeatures", "params": params}


def open_clip_embedder2(part: Part, key: str, kind: str) -> dict:
    """FrozenOpenCLIPEmbedder2: with `legacy` as the first one, else without the last norm."""
    legacy, pooled = part.take("legacy", True), part.take("always_return_pooled", False)
    if legacy and pooled:
        part.problem("always_return_pooled", "needs legacy: False")
    node = compvis_conditions.open_clip_embedder(part, key, kind)
    node["params"] |= {"normed": legacy, "pooled": pooled}
    return node


def sizes_embedder(part: Part, key: str, kind: str) -> dict:
    params = {"key": key, "dim": part.take("outdim")}
    part.finish()
    return {"target": "ldm.conditioning.vectors.SinusoidalNumbers", "params": params}


def spatial_rescaler(part: Part, key: str, kind: str) -> dict:
    kernel = take_given(part, {"kernel_size": "kernel_size"})
    part.only("wrap_video", (False,), "video is not supported")
    part.ignore({"remap_output": "so where out_channels is given"})
    node = compvis_conditions.spatial_rescaler(part, key, kind)
    node["params"] |= kernel
    return node


_ENCODERS = "sgm.modules.encoders.modules."
EMBEDDERS: dict[str, Callable[[Part, str, str], dict]] = {
    _ENCODERS + "ClassEmbedder": class_embedder,
    _ENCODERS + "FrozenCLIPEmbedder": compvis_conditions.clip_embedder,
    _ENCODERS + "FrozenOpenCLIPEmbedder": compvis_conditions.open_clip_embedder,
    _ENCODERS + "FrozenOpenCLIPEmbedder2": open_clip_embedder2,
    _ENCODERS + "ConcatTimestepEmbedderND": sizes_embedder,
    _ENCODERS + "SpatialRescaler": spatial_rescaler,
}


def conditioner(part: Part) -> dict:
    """GeneralConditioner. Without an `ucg_rate`, texts beside other embedders are absent as zeros, as sgm
    samples SDXL; a text alone is absent as the empty text, as it samples Stable Diffusion 2.
    """
    nodes = part.take("emb_models")
    embedders = [
        _embedder(Part(node, f"{part.place('emb_models')}.{i}", part.reading), len(nodes))
        for i, node in enumerate(nodes)
    ]
    part.finish()
    params = {"embedders": embedders, "crossattn_merge": "channels"}
    return {"target": "ldm.conditioning.Conditioner", "params": params}


def _embedder(part: Part, count: int) -> dict:
    key, rate, legacy = (part.take_beside(name) for name in ("input_key", "ucg_rate", "legacy_ucg_value"))
    part.take_beside("is_trainable")
    if key is None:
        part.reading.problem(part.path, "has no input_key; several keys for one embedder are not supported")
    node = lookup(part, EMBEDDERS, "embedder")(part, key or "", "crossattn")
    if node["target"].endswith("TextEmbedder"):
        if legacy not in (None, ""):
            part.reading.problem(
                f"{part.path}.legacy_ucg_value", f"is {legacy!r}; only the empty text is supported"
            )
        node["params"]["absent"] = "zeros" if legacy is None and (rate or count > 1) else "empty"
    elif legacy is not None:
        part.reading.problem(f"{part.path}.legacy_ucg_value", "is supported for texts only")
    if rate:
        if node["target"].endswith("SpatialRescaler"):
            part.reading.problem(f"{part.path}.ucg_rate", "is not supported for maps")
        node["params"]["drop"] = rate
    return node


# Denoiser


def denoiser(part: Part, sampler: Mapping | None) -> dict:
    """Denoiser and DiscreteDenoiser with their scaling."""
    scaling_part = part.part("scaling_config")
    name = scaling_part.target.removeprefix("sgm.modules.diffusionmodules.denoiser_scaling.")
    discrete = part.target.endswith(".DiscreteDenoiser")
    supported = ("EpsScaling", "VScaling") if discrete else ("EDMScaling",)
    if name not in supported:
        part.reading.problem(
            f"{scaling_part.path}.target",
            f"{scaling_part.target!r} is not supported with {part.target.rpartition('.')[2]} "
            f"(supported: {', '.join(supported)})",
        )
    part.ignore(_LOSS)
    if discrete:
        params = {"prediction": {"VScaling": "v"}.get(name, "eps"), "schedule": _discrete_schedule(part)}
    else:
        params = {"prediction": "edm", "schedule": _edm_schedule(sampler, part)}
        params |= take_given(scaling_part, {"sigma_data": "sigma_data"})
    scaling_part.finish()
    part.finish()
    return {"target": "ldm.diffusion.denoiser.Denoiser", "params": params}


def _discrete_schedule(part: Part) -> dict:
    steps, table = part.take("num_idx"), part.part("discretization_config")
    if table.target != _DISCRETIZER + "LegacyDDPMDiscretization":
        part.reading.problem(
            f"{table.path}.target", f"{table.target!r} is not supported (supported: LegacyDDPMDiscretization)"
        )
    params = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
    renames = {"linear_start": "linear_start", "linear_end": "linear_end", "num_timesteps": "timesteps"}
    params |= take_given(table, renames)
    table.finish()
    if steps != params["timesteps"]:
        part.problem("num_idx", f"is {steps}; only all of the {params['timesteps']} timesteps are supported")
    part.only("do_append_zero", (False,), "a noise level of zero is not supported")
    part.only("flip", (True,), "only ascending noise levels are supported")
    part.only("quantize_c_noise", (True,), "only times of the table are supported")
    return {"target": "ldm.diffusion.schedule.DiscreteSchedule", "params": {"schedule": "linear"} | params}


def _edm_schedule(sampler: Mapping | None, part: Part) -> dict:
    """The range of sigma stands in the sampler's discretization, if anywhere."""
    found = ((sampler or {}).get("params") or {}).get("discretization_config") or {}
    given = found.get("params") or {} if str(found.get("target", "")).endswith(".EDMDiscretization") else {}
    params = {name: given[name] for name in ("sigma_min", "sigma_max") if name in given}
    return {"target": "ldm.diffusion.schedule.EDMSchedule", "params": params}


_DISCRETIZER = "sgm.modules.diffusionmodules.discretizer."
DENOISERS = {
    "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser": denoiser,
    "sgm.modules.diffusionmodules.denoiser.Denoiser": denoiser,
}

# Sides in pixels at which models were published, which their YAMLs do not say: (adm_in_channels, prediction).
PUBLISHED_SIZES = {(2816, "eps"): 1024, (2560, "eps"): 1024}
TEXT_SIZES = {"eps": 512, "v": 768}


def image_size(network: Mapping, prediction: str, first: Mapping) -> int:
    """The side in pixels that sampling produces: the published one, else the first stage's resolution."""
    found = PUBLISHED_SIZES.get((network.get("adm_in_channels"), prediction))
    if found is None and network.get("context_dim") == 1024 and network.get("num_classes") is None:
        found = TEXT_SIZES.get(prediction)
    encoder = first["params"].get("ddconfig") or first["params"].get("encoder") or {}
    return found or encoder.get("resolution", 32)


def diffusion_engine(part: Part) -> Translated:
    network_part = part.part("network_config")
    network = lookup(network_part, NETWORKS, "network")(network_part)
    first_part = part.part("first_stage_config")
    out_channels = network.node["params"].get("out_channels")
    first = lookup(first_part, FIRST_STAGES, "first stage")(first_part, out_channels)
    sampler, denoiser_part = part.take("sampler_config", None), part.part("denoiser_config")
    denoise = lookup(denoiser_part, DENOISERS, "denoiser")(denoiser_part, sampler)
    scale = part.take("scale_factor", 1.0)
    params: dict[str, Any] = {
        "first_stage": first.node,
        "network": network.node,
        "denoiser": denoise,
        "image_size": image_size(network.node["params"], denoise["params"]["prediction"], first.node),
        "latent_scale": scale,
    }
    config = part.take("conditioner_config", None)
    if config is not None:
        conditioner_part = Part(config, part.place("conditioner_config"), part.reading)
        params["conditioner"] = lookup(conditioner_part, CONDITIONERS, "conditioner")(conditioner_part)
    wrapper = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"
    part.only("network_wrapper", (None, wrapper), "other wrappers are not supported")
    part.ignore(ENGINE_TRAINING)
    part.finish()
    part.reading.note(
        part.place(),
        f"the image size is not said: {params['image_size']} pixels are taken (latents of "
        f"{params['image_size'] // latent_sizes(first.node)[1]})",
    )

    def view(model: nn.Module) -> nn.Module:
        return Shell(
            model=model.model,
            first_stage_model=first.view(model.first_stage_model),
            conditioner=model.conditioner,
        )

    node = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}
    return Translated(node, view, averaged="model.", latent_scale=scale)


CONDITIONERS = {
    "sgm.modules.GeneralConditioner": conditioner,
    "sgm.modules.encoders.modules.GeneralConditioner": conditioner,
}
MODELS: dict[str, Callable[[Part], Translated]] = {
    "sgm.models.diffusion.DiffusionEngine": diffusion_engine,
    **FIRST_STAGES,
    **NETWORKS,
}
