"""CompVis/latent-diffusion, CompVis/stable-diffusion, Stability-AI/stablediffusion: YAMLs in our terms.

Target names, parameters and their defaults are facts of those repositories; Rombach et al. 2021
(https://arxiv.org/abs/2112.10752).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.originals.compvis_conditions import EMBEDDERS
from ldm.checkpoints.originals.original_yaml import Part
from ldm.checkpoints.originals.translation import Shell, Translated, factor_of, lookup, same_names, take_given
from ldm.models.unet import UNetModel

FIRST_STAGE_TRAINING = {
    "lossconfig": "the loss and its discriminator",
    "ckpt_path": "the weights come from the checkpoint that is loaded",
    "ignore_keys": "concerns ckpt_path",
    "image_key": "the batch key of training",
    "colorize_nlabels": "a random projection that displays segmentations",
    "monitor": "which checkpoint training keeps",
    "batch_resize_range": "augmentation of training",
    "scheduler_config": "the learning rate's schedule",
    "lr_g_factor": "a learning rate",
    "use_ema": "whether there are averaged weights is seen in the checkpoint",
    "learn_logvar": "concerns the loss",
    "ema_decay": "concerns training",
}
DIFFUSION_TRAINING = {
    "loss_type": "the loss",
    "ckpt_path": "the weights come from the checkpoint that is loaded",
    "ignore_keys": "concerns ckpt_path",
    "load_only_unet": "concerns ckpt_path",
    "monitor": "which checkpoint training keeps",
    "use_ema": "whether there are averaged weights is seen in the checkpoint",
    "first_stage_key": "the batch key of training",
    "log_every_t": "logging",
    "original_elbo_weight": "the loss",
    "l_simple_weight": "the loss",
    "scheduler_config": "the learning rate's schedule",
    "use_positional_encodings": "never read by the original",
    "learn_logvar": "the loss",
    "logvar_init": "the loss",
    "num_timesteps_cond": "noise on conditions in training",
    "cond_stage_trainable": "what training changes",
    "make_it_fit": "concerns ckpt_path",
    "ucg_training": "dropping of conditions in training",
    "reset_ema": "training",
    "reset_num_ema_updates": "training",
}
INPAINTING_TRAINING = {
    "finetune_keys": "how training began from another model",
    "keep_finetune_dims": "how training began from another model",
    "c_concat_log_start": "logging",
    "c_concat_log_end": "logging",
}

# What the original's samplers do where the caller says nothing more than the number of steps.
SAMPLER_DEFAULTS = {"ddim": {"spacing": "uniform"}, "plms": {"spacing": "uniform"}}


# First stages: (part, channels of the images if there is no encoder) -> Translated


def autoencoder_kl(part: Part, channels: int | None = None) -> Translated:
    params = {"ddconfig": part.take("ddconfig"), "embed_dim": part.take("embed_dim")}
    part.ignore(FIRST_STAGE_TRAINING)
    part.finish()
    return Translated({"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}, averaged="")


def vq_model(part: Part, channels: int | None = None) -> Translated:
    params = {name: part.take(name) for name in ("ddconfig", "n_embed", "embed_dim")}
    optional = ("remap", "sane_index_shape", "legacy", "beta", "unknown_index")
    params |= take_given(part, {name: name for name in optional})
    part.ignore(FIRST_STAGE_TRAINING)
    part.finish()
    return Translated({"target": "ldm.models.autoencoder.VQModel", "params": params}, averaged="")


def identity_first_stage(part: Part, channels: int | None = None) -> Translated:
    channels = part.take("channels", 3 if channels is None else channels)
    part.ignore({"vq_interface": "the shape of its result", **FIRST_STAGE_TRAINING})
    part.finish()
    return Translated(
        {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {"channels": channels}}
    )


FIRST_STAGES: dict[str, Callable[[Part, int | None], Translated]] = {
    "ldm.models.autoencoder.AutoencoderKL": autoencoder_kl,
    "ldm.models.autoencoder.VQModel": vq_model,
    "ldm.models.autoencoder.VQModelInterface": vq_model,
    "ldm.models.autoencoder.IdentityFirstStage": identity_first_stage,
    "taming.models.vqgan.VQModel": vq_model,
}


def latent_sizes(node: Mapping) -> tuple[int, int]:
    """(channels, downsampling factor) of a translated first stage."""
    params = node["params"]
    if "ddconfig" in params:
        return params["embed_dim"], factor_of(params["ddconfig"])
    if "encoder" in params:
        return params["encoder"]["z_channels"], factor_of(params["encoder"])
    return params["channels"], 1


# Networks: part -> Translated

UNET_IGNORED = {
    "image_size": "any size is taken",
    "use_fp16": "the type is chosen when the model is loaded",
    "use_bf16": "the type is chosen when the model is loaded",
}


def unet(part: Part, **defaults: Any) -> Translated:
    params = defaults | take_given(part, same_names(UNetModel, tuple(UNET_IGNORED)))
    part.ignore(UNET_IGNORED)
    part.finish()
    return Translated({"target": "ldm.models.unet.UNetModel", "params": params})


NETWORKS: dict[str, Callable[[Part], Translated]] = {
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": unet
}


# The conditioning keys of the original, and the kinds of this toolkit that the condition's model gives.
CONDITIONING_KEYS = {"concat": "concat", "crossattn": "crossattn", "hybrid": "crossattn", "adm": "vector"}


# Whole models


def latent_diffusion(part: Part, inpainting: bool = False) -> Translated:
    """LatentDiffusion, and with `inpainting` LatentInpaintDiffusion of Stable Diffusion."""
    network_part = part.part("unet_config")
    network = lookup(network_part, NETWORKS, "network")(network_part)
    channels = part.take("channels", 3)
    first_part = part.part("first_stage_config")
    first = lookup(first_part, FIRST_STAGES, "first stage")(first_part, channels)
    latent_channels, factor = latent_sizes(first.node)
    size = part.take("image_size", 256)
    scale, by_std = part.take("scale_factor", 1.0), bool(part.take("scale_by_std", False))
    embedders, cond_is_first = _conditions(part, network.node["params"], latent_channels, inpainting)
    params = {
        "first_stage": first.node,
        "network": network.node,
        "denoiser": denoiser(part),
        "conditioner": {"target": "ldm.conditioning.Conditioner", "params": {"embedders": embedders}},
        "image_size": [side * factor for side in size] if isinstance(size, list) else size * factor,
        "latent_scale": scale,
        "sampler_defaults": SAMPLER_DEFAULTS,
    }
    part.ignore(DIFFUSION_TRAINING | {"clip_denoised": "LatentDiffusion turns it off"})
    part.finish()

    def view(model: nn.Module) -> nn.Module:
        shell = Shell(model=model.model, first_stage_model=first.view(model.first_stage_model))
        if cond_is_first:  # the same module under a second name, as in the original's files
            shell.cond_stage_model = shell.first_stage_model
        elif embedders:
            shell.cond_stage_model = model.conditioner.embedders[0]
        if by_std:
            shell.register_buffer("scale_factor", torch.ones(()))
        return shell

    node = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}
    return Translated(node, view, averaged="model.", latent_scale=scale, scale_in_file=by_std)


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
    on_top = network.get("in_channels", 0) - latent_channels
    if config == "__is_first_stage__":
        # The mask lies beside the masked image; only the number of channels tells that there is one.
        return [
            _encoded_image(key, scaled=False),
            *([_mask()] if on_top == latent_channels + 1 else []),
        ], True
    cond_part = Part(config, name, part.reading)
    embedders = [lookup(cond_part, EMBEDDERS, "model of a condition")(cond_part, key, kind)]
    if inpainting:
        image = part.take("masked_image_key", "masked_image")
        keys = part.take("concat_keys", ["mask", image])
        part.ignore(INPAINTING_TRAINING)
        embedders += [_encoded_image(key, scaled=True) if key == image else _mask(key) for key in keys]
    elif conditioning == "hybrid":
        embedders.append({"target": "ldm.conditioning.maps.ImageMap", "params": {"key": "concat"}})
    return embedders, False


def _encoded_image(key: str, scaled: bool) -> dict:
    return {"target": "ldm.conditioning.maps.EncodedImage", "params": {"key": key, "scaled": scaled}}


def _mask(key: str = "mask") -> dict:
    return {"target": "ldm.conditioning.maps.Mask", "params": {"key": key}}


def latent_inpaint_diffusion(part: Part) -> Translated:
    return latent_diffusion(part, inpainting=True)


def ddpm(part: Part) -> Translated:
    """DDPM: the same in pixel space, without a condition."""
    network_part = part.part("unet_config")
    network = lookup(network_part, NETWORKS, "network")(network_part)
    channels = part.take("channels", 3)
    part.only(
        "conditioning_key", (None,), "DDPM has no condition; use LatentDiffusion with IdentityFirstStage"
    )
    params = {
        "first_stage": {
            "target": "ldm.models.autoencoder.IdentityFirstStage",
            "params": {"channels": channels},
        },
        "network": network.node,
        "denoiser": denoiser(part),
        "image_size": part.take("image_size", 256),
        "clip_x0": part.take("clip_denoised", True),
        "sampler_defaults": SAMPLER_DEFAULTS,
    }
    part.ignore(DIFFUSION_TRAINING)
    part.finish()
    node = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}
    return Translated(node, lambda model: Shell(model=model.model), averaged="model.")


def denoiser(part: Part) -> dict:
    """The noise schedule and what the network predicts, from the parameters of DDPM."""
    prediction = part.take("parameterization", "eps")
    if prediction not in ("eps", "x0", "v"):
        part.problem("parameterization", f"{prediction!r} is none of eps, x0, v")
    part.only("v_posterior", (0.0, 0), "only the posterior's own variance (0) is supported")
    names = ("linear_start", "linear_end", "cosine_s", "timesteps")
    schedule = take_given(part, {"beta_schedule": "schedule"} | {name: name for name in names})
    schedule |= {"betas": betas} if (betas := part.take("given_betas", None)) is not None else {}
    return {
        "target": "ldm.diffusion.denoiser.Denoiser",
        "params": {
            "prediction": prediction,
            "schedule": {"target": "ldm.diffusion.schedule.DiscreteSchedule", "params": schedule},
        },
    }


MODELS: dict[str, Callable[[Part], Translated]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_diffusion,
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": latent_inpaint_diffusion,
    "ldm.models.diffusion.ddpm.DDPM": ddpm,
    **FIRST_STAGES,
    **NETWORKS,
}
