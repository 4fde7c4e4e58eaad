"""CompVis/latent-diffusion, CompVis/stable-diffusion, Stability-AI/stablediffusion: YAMLs in our terms.

Target names, parameters and their defaults are facts of those repositories; Rombach et al. 2021
(https://arxiv.org/abs/2112.10752).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.description import node
from ldm.checkpoints.originals.compvis_conditions import EMBEDDERS
from ldm.checkpoints.originals.original_yaml import Part, Translated
from ldm.config.signatures import parameters
from ldm.models.unet import UNetModel

# Parameters of training, its loss and its display; those of the first stages are sgm's, too. Whether a file
# has averaged weights (`use_ema`) is seen in it; the original never reads `use_positional_encodings`.
FIRST_STAGE_TRAINING = """
    lossconfig learn_logvar ckpt_path ignore_keys image_key colorize_nlabels monitor batch_resize_range
    scheduler_config lr_g_factor use_ema ema_decay loss_config ckpt_engine input_key optimizer_config
    trainable_ae_params ae_optimizer_args trainable_disc_params disc_optimizer_args disc_start_iter
    diff_boost_factor max_batch_size
"""
DIFFUSION_TRAINING = """
    loss_type original_elbo_weight l_simple_weight learn_logvar logvar_init monitor ckpt_path ignore_keys
    load_only_unet make_it_fit use_ema reset_ema reset_num_ema_updates first_stage_key log_every_t
    scheduler_config use_positional_encodings num_timesteps_cond cond_stage_trainable ucg_training
"""
_INPAINTING_TRAINING = ("finetune_keys", "keep_finetune_dims", "c_concat_log_start", "c_concat_log_end")

# What the original's samplers do where the caller says nothing more than the number of steps.
SAMPLER_DEFAULTS = {"ddim": {"spacing": "uniform"}, "plms": {"spacing": "uniform"}}


# First stages: (part, channels of the images if there is no encoder) -> Translated


def autoencoder_kl(part: Part, channels: int | None = None) -> Translated:
    needs = ("ddconfig", "embed_dim")
    stage = part.node("models.autoencoder.AutoencoderKL", needs=needs, ignored=FIRST_STAGE_TRAINING.split())
    return Translated(stage, averaged="")


def vq_model(part: Part, channels: int | None = None) -> Translated:
    given = ("remap", "sane_index_shape", "legacy", "beta", "unknown_index")
    needs = ("ddconfig", "n_embed", "embed_dim")
    stage = part.node("models.autoencoder.VQModel", *given, needs=needs, ignored=FIRST_STAGE_TRAINING.split())
    return Translated(stage, averaged="")


def identity_first_stage(part: Part, channels: int | None = None) -> Translated:
    channels = part.take("channels", 3 if channels is None else channels)
    part.finish("vq_interface", *FIRST_STAGE_TRAINING.split())
    return Translated(pixels(channels))


def pixels(channels: int) -> dict:
    """No first stage."""
    return node("models.autoencoder.IdentityFirstStage", channels=channels)


FIRST_STAGES: dict[str, Callable[[Part, int | None], Translated]] = {
    "ldm.models.autoencoder.AutoencoderKL": autoencoder_kl,
    "ldm.models.autoencoder.VQModel": vq_model,
    "ldm.models.autoencoder.VQModelInterface": vq_model,
    "ldm.models.autoencoder.IdentityFirstStage": identity_first_stage,
    "taming.models.vqgan.VQModel": vq_model,
}


def latent_sizes(first_stage: Mapping) -> tuple[int, int]:
    """(channels, downsampling factor) of a translated first stage."""
    params = first_stage["params"]
    if "ddconfig" in params:
        channels, dd = params["embed_dim"], params["ddconfig"]
    elif "encoder" in params:
        channels, dd = params["encoder"]["z_channels"], params["encoder"]
    else:
        return params["channels"], 1
    return channels, 2 ** (len(dd["ch_mult"]) - 1)


# Networks: part -> Translated

# Any size is taken, and the type is chosen when the model is loaded.
_UNET_IGNORED = ("image_size", "use_fp16", "use_bf16")


def unet(part: Part, *ignored: str, **defaults: Any) -> Translated:
    given = [name for name in parameters(UNetModel) if name not in _UNET_IGNORED]
    made = part.node("models.unet.UNetModel", *given, ignored=(*_UNET_IGNORED, *ignored))
    return Translated(made | {"params": defaults | made["params"]})


NETWORKS = {"ldm.modules.diffusionmodules.openaimodel.UNetModel": unet}

# The conditioning keys of the original, and the kinds of this toolkit that the condition's model gives.
CONDITIONING_KEYS = {"concat": "concat", "crossattn": "crossattn", "hybrid": "crossattn", "adm": "vector"}


# Whole models


def latent_diffusion(part: Part, inpainting: bool = False) -> Translated:
    """LatentDiffusion, and with `inpainting` LatentInpaintDiffusion of Stable Diffusion."""
    network = part.translated("unet_config", NETWORKS, "network").node
    channels = part.take("channels", 3)
    first = part.translated("first_stage_config", FIRST_STAGES, "first stage", channels)
    latent_channels, factor = latent_sizes(first.node)
    size = part.take("image_size", 256)
    scale, by_std = part.take("scale_factor", 1.0), bool(part.take("scale_by_std", False))
    embedders, cond_is_first = _conditions(part, network["params"], latent_channels, inpainting)
    whole = node(
        "latent_diffusion.LatentDiffusion",
        first_stage=first.node,
        network=network,
        denoiser=denoiser(part),
        conditioner=node("conditioning.Conditioner", embedders=embedders),
        image_size=[side * factor for side in size] if isinstance(size, list) else size * factor,
        latent_scale=scale,
        sampler_defaults=SAMPLER_DEFAULTS,
    )
    # LatentDiffusion turns clip_denoised off.
    part.finish("clip_denoised", *DIFFUSION_TRAINING.split(), *(_INPAINTING_TRAINING if inpainting else ()))

    def view(model: nn.Module) -> nn.Module:
        theirs = nn.ModuleDict(
            {"model": model.model, "first_stage_model": first.view(model.first_stage_model)}
        )
        if cond_is_first:  # the same module under a second name, as in the original's files
            theirs.cond_stage_model = theirs.first_stage_model
        elif embedders:
            theirs.cond_stage_model = model.conditioner.embedders[0]
        if by_std:
            theirs.register_buffer("scale_factor", torch.ones(()))
        return theirs

    return Translated(whole, view, averaged="model.", latent_scale=scale, scale_in_file=by_std)


def _conditions(
    part: Part, network: Mapping, latent_channels: int, inpainting: bool
) -> tuple[list[dict], bool]:
    """(embedders, whether the first stage is the condition's model)."""
    config, name = part.take("cond_stage_config", None), part.place("cond_stage_config")
    key, concat = part.take("cond_stage_key", "image"), part.take("concat_mode", True)
    conditioning = part.take("conditioning_key", None)
    part.only("cond_stage_forward", (None, "encode"), "only the condition's model itself can be called")
    part.only("force_null_conditioning", (False,), "is not supported")
    if config == "__is_unconditional__" or config is None:
        return [], False
    conditioning = conditioning or ("concat" if concat else "crossattn")
    if conditioning not in CONDITIONING_KEYS:
        known = ", ".join(CONDITIONING_KEYS)
        part.problem("conditioning_key", f"{conditioning!r} is not supported (known: null, {known})")
        return [], False
    kind = CONDITIONING_KEYS[conditioning]
    if config == "__is_first_stage__":
        # The mask lies beside the masked image; only the number of channels tells that there is one.
        masked = network.get("in_channels", 0) == 2 * latent_channels + 1
        mask = [node("conditioning.maps.Mask", key="mask")] if masked else []
        return [node("conditioning.maps.EncodedImage", key=key, scaled=False), *mask], True
    cond_part = Part(config, name, part.reading)
    embedders = [cond_part.translator(EMBEDDERS, "model of a condition")(cond_part, key, kind)]
    if inpainting:
        image = part.take("masked_image_key", "masked_image")
        for key in part.take("concat_keys", ["mask", image]):
            encoded = node("conditioning.maps.EncodedImage", key=key, scaled=True)
            embedders.append(encoded if key == image else node("conditioning.maps.Mask", key=key))
    elif conditioning == "hybrid":
        embedders.append(node("conditioning.maps.ImageMap", key="concat"))
    return embedders, False


def ddpm(part: Part) -> Translated:
    """DDPM: the same in pixel space, without a condition."""
    network = part.translated("unet_config", NETWORKS, "network").node
    part.only("conditioning_key", (None,), "DDPM has none, LatentDiffusion with IdentityFirstStage has")
    whole = node(
        "latent_diffusion.LatentDiffusion",
        first_stage=pixels(part.take("channels", 3)),
        network=network,
        denoiser=denoiser(part),
        image_size=part.take("image_size", 256),
        clip_x0=part.take("clip_denoised", True),
        sampler_defaults=SAMPLER_DEFAULTS,
    )
    part.finish(*DIFFUSION_TRAINING.split())
    return Translated(whole, lambda model: nn.ModuleDict({"model": model.model}), averaged="model.")


def denoiser(part: Part) -> dict:
    """The noise schedule and what the network predicts, from the parameters of DDPM."""
    predictions = ("eps", "x0", "v")
    prediction = part.only("parameterization", predictions, f"known are {', '.join(predictions)}")
    part.only("v_posterior", (0.0, 0), "only the posterior's own variance (0) is supported")
    schedule = part.given("linear_start", "linear_end", "cosine_s", "timesteps", beta_schedule="schedule")
    schedule |= {"betas": betas} if (betas := part.take("given_betas", None)) is not None else {}
    table = node("diffusion.schedule.DiscreteSchedule", **schedule)
    return node("diffusion.denoiser.Denoiser", prediction=prediction, schedule=table)


MODELS: dict[str, Callable[[Part], Translated]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_diffusion,
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": partial(latent_diffusion, inpainting=True),
    "ldm.models.diffusion.ddpm.DDPM": ddpm,
    **FIRST_STAGES,
    **NETWORKS,
}
