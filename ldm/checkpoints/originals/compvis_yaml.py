"""Our models in the terms of the original LDM's YAML (CompVis/latent-diffusion, with SD 2's additions).

Targets and parameters are facts of those repositories. What they cannot express is refused with all reasons.
"""

from typing import Any

from torch import nn

from ldm.arguments import arguments_of
from ldm.checkpoints.description import NotExpressible
from ldm.checkpoints.originals.compvis_conditions import original_condition
from ldm.config import signatures
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import DiscreteSchedule
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.models.encoder_decoder import ddconfig_of
from ldm.models.unet import UNetModel

_GROUPS = 32  # of every GroupNorm of the original
# Of the UNet's arguments those that the original has not; of the others it has our defaults, but for one.
_UNET_OURS = (
    *("transformer_depth_middle", "disable_middle_transformer", "attn_type", "attn_options", "num_groups"),
    *("spatial_transformer_attn_type", "image_size", "use_fp16"),
)
_UNET_DEFAULTS = {name: p.default for name, p in signatures.parameters(UNetModel).items()} | {
    "use_spatial_transformer": False
}


def original_config(model: nn.Module, folded: bool = False) -> dict[str, Any]:
    """The YAML's `model:` tree for a first stage or a `LatentDiffusion`.

    Args:
        folded: the latents' shift and scale are in the first stage's weights.

    Raises:
        NotExpressible: everything that the original does not have.
    """
    reasons: list[str] = []
    if isinstance(model, LatentDiffusion):
        tree = _latent_diffusion(model, folded, reasons)
    else:
        tree = _first_stage(model, "VQModel", reasons)
    if reasons:
        raise NotExpressible("the original LDM cannot express this model", reasons)
    return {"model": {"base_learning_rate": 1.0e-6, **tree}}


def _latent_diffusion(model: LatentDiffusion, folded: bool, reasons: list[str]) -> dict[str, Any]:
    channels, height, width = model.latent_shape
    if height != width:
        reasons.append(f"its images are {model.image_size[0]}x{model.image_size[1]}, not square")
    scales = set(model.latent_scale.flatten().tolist())
    if not folded and (len(scales) > 1 or model.latent_shift.any()):
        reasons.append("its latents have a shift or a scale for each channel, and no AutoencoderKL for it")
    params = {
        **_schedule(model.denoiser, reasons),
        "log_every_t": 200,
        "num_timesteps_cond": 1,
        "first_stage_key": "image",
        **_condition(model, reasons),
        "image_size": height,
        "channels": channels,
        "cond_stage_trainable": False,
        "scale_factor": 1.0 if folded else min(scales),
        "use_ema": False,
        "unet_config": _unet(model.network, height, reasons),
        "first_stage_config": _first_stage(model.first_stage_model, "VQModelInterface", reasons),
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _schedule(denoiser: Denoiser, reasons: list[str]) -> dict[str, Any]:
    schedule = denoiser.schedule
    if denoiser.learned_variance:
        reasons.append("its network predicts variances (learned_variance)")
    if not isinstance(schedule, DiscreteSchedule) or denoiser.prediction not in ("eps", "x0", "v"):
        what = f"{denoiser.prediction!r} on a {type(schedule).__name__}"
        reasons.append(f"it predicts {what}; the original knows eps, x0 and v over discrete timesteps")
        return {}
    if schedule.zero_terminal_snr:
        reasons.append("its schedule ends without signal (zero_terminal_snr)")
    made = arguments_of(schedule)
    params = {"parameterization": denoiser.prediction, "timesteps": schedule.timesteps}
    if made["betas"] is not None:
        return params | {"given_betas": schedule.betas.tolist()}
    used = ("cosine_s",) if made["schedule"] == "cosine" else ("linear_start", "linear_end")
    return params | {"beta_schedule": made["schedule"]} | {name: made[name] for name in used}


def _unet(unet: nn.Module, image_size: int, reasons: list[str]) -> dict[str, Any]:
    if type(unet) is not UNetModel:
        reasons.append(f"its network is a {type(unet).__name__}, not a UNetModel")
        return {}
    found = arguments_of(unet)
    fixed = {"num_groups": _GROUPS, "attn_type": "attention", "disable_middle_transformer": False}
    reasons += [f"{name} of the network is not {only}" for name, only in fixed.items() if found[name] != only]
    for name in ("num_res_blocks", "transformer_depth"):
        if not isinstance(found[name], int) and len(set(found[name])) == 1:
            found[name] = found[name][0]
    if found["use_spatial_transformer"] is None:
        found["use_spatial_transformer"] = found["context_dim"] is not None
    depth, middle = found["transformer_depth"], found["transformer_depth_middle"]
    if not isinstance(depth, int) or middle not in (None, depth):
        reasons.append("its transformers differ in depth between levels")
    if found["use_spatial_transformer"] and found["context_dim"] is None:
        reasons.append("its transformers have no context")
    if found["num_classes"] == "timestep":
        reasons.append('num_classes is "timestep"')
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if name not in _UNET_OURS and value != _UNET_DEFAULTS[name]
    }
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return {"target": target, "params": {"image_size": image_size, **given}}


def _first_stage(model: nn.Module, vq_class: str, reasons: list[str]) -> dict[str, Any]:
    target = "ldm.models.autoencoder."
    if isinstance(model, IdentityFirstStage):
        return {"target": target + "IdentityFirstStage", "params": {}}
    if type(model) not in (AutoencoderKL, VQModel):
        reasons.append(f"a {type(model).__name__} is no first stage of the original")
        return {}
    found, ddconfig = arguments_of(model), ddconfig_of(model.encoder, model.decoder)
    if ddconfig.pop("num_groups") != _GROUPS:
        reasons.append(f"num_groups of the first stage is not {_GROUPS}")
    ddconfig.pop("attn_options")
    if ddconfig["attn_type"] not in ("vanilla", "linear", "none"):
        reasons.append(f"attn_type of the first stage is {ddconfig['attn_type']}")
    if found.get("remap") is not None:
        reasons.append("the codebook's indices are remapped by a list; the original reads it from a file")
    no_loss = {"target": "torch.nn.Identity"}
    params = {"embed_dim": found["embed_dim"], "ddconfig": ddconfig, "lossconfig": no_loss}
    if isinstance(model, AutoencoderKL):
        return {"target": target + "AutoencoderKL", "params": params}
    params = {"n_embed": found["n_embed"], "sane_index_shape": found["sane_index_shape"], **params}
    return {"target": target + vq_class, "params": params}


def _condition(model: LatentDiffusion, reasons: list[str]) -> dict[str, Any]:
    """`conditioning_key`, `cond_stage_key` and `cond_stage_config`."""
    embedders = list(model.conditioner.embedders)
    names = ("conditioning_key", "cond_stage_key", "cond_stage_config")
    if not embedders:
        return dict(zip(names, (None, "class_label", "__is_unconditional__"), strict=True))
    found = original_condition(embedders[0]) if len(embedders) == 1 else None
    if found is not None:
        return dict(zip(names, found, strict=True))
    listed = ", ".join(f"{type(e).__name__}({e.kind})" for e in embedders)
    written = "class labels, class tokens, texts of BERTEmbedder (8 heads of 64) or CLIP (published sizes)"
    reasons.append(f"its conditions are {listed}; written are {written}")
    return {}
