"""The first stages as diffusers' `AutoencoderKL` and `VQModel`: their configs, from ours and to ours."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.arguments import arguments_of
from ldm.checkpoints.description import NotExpressible, node
from ldm.checkpoints.diffusers.model_config import Reader
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.models.autoencoding_engine import AutoencodingEngine
from ldm.models.encoder_decoder import ddconfig_of

CLASSES = ("AutoencoderKL", "VQModel")

#: What diffusers takes where a config says nothing.
_DEFAULTS = {
    **dict.fromkeys(("in_channels", "out_channels"), 3),
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    **dict.fromkeys(("norm_num_groups", "sample_size"), 32),
    "mid_block_add_attention": True,
    "scaling_factor": 0.18215,
}
_DEFAULTS_KL = {
    **_DEFAULTS,
    "latent_channels": 4,
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), True),
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std")),
}
_DEFAULTS_VQ = {**_DEFAULTS, "latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None}
_FIXED_KL = {"act_fn": "silu"}
_FIXED_VQ = {"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False}
_HARMLESS = frozenset({"force_upcast"})
# Blocks by whether their level has attention. With a plain type a level would be built without its attention,
# and only a warning say so.
_DOWN = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
_UP = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}
_BLOCKS = (("down_block_types", _DOWN), ("up_block_types", _UP))


def first_stage_config(model: nn.Module, sample_size: int | None = None) -> dict[str, Any]:
    """The config of the class that holds this first stage, without the latents' scale.

    Raises:
        NotExpressible: with everything that neither class has.
    """
    engine = isinstance(model, AutoencodingEngine) and model.regularizer == "kl"
    if not engine and type(model) not in (AutoencoderKL, VQModel):
        known = ["only a KL first stage, and a VQ one with convolutions around its latent, have one"]
        raise NotExpressible(f"diffusers has no class for this {type(model).__name__}", known)
    arguments = arguments_of(model)
    try:
        dd = ddconfig_of(model.encoder, model.decoder)
    except ValueError as error:
        raise NotExpressible(f"diffusers cannot hold this {type(model).__name__}", [str(error)]) from error
    attends = [len(level.attn) > 0 for level in model.encoder.down]
    _check_expressible(arguments, dd, attends)
    vq = isinstance(model, VQModel)
    config = {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "down_block_types": [_DOWN[attention] for attention in attends],
        "up_block_types": [_UP[attention] for attention in reversed(attends)],
        "block_out_channels": [dd["ch"] * mult for mult in dd["ch_mult"]],
        "layers_per_block": dd["num_res_blocks"],
        "latent_channels": dd["z_channels"],
        "norm_num_groups": dd["num_groups"],
        "sample_size": sample_size or dd["resolution"],  # diffusers divides by it: null will not do
        "mid_block_add_attention": dd["attn_type"] == "vanilla",
        **(_FIXED_VQ if vq else _FIXED_KL),
    }
    if vq:
        return config | {"num_vq_embeddings": arguments["n_embed"], "vq_embed_dim": arguments["embed_dim"]}
    return config | {"use_quant_conv": not engine, "use_post_quant_conv": not engine}


def _check_expressible(arguments: dict, dd: dict, attends: list[bool]) -> None:
    embed_dim = arguments.get("embed_dim", dd["z_channels"])
    other_attention, other_dim = dd["attn_type"] not in ("vanilla", "none"), embed_dim != dd["z_channels"]
    found = {
        f"its attention is {dd['attn_type']}; diffusers has softmax attention only": other_attention,
        "attn_resolutions names levels, but attn_type is none": dd["attn_type"] == "none" and any(attends),
        "resamp_with_conv is False; diffusers resamples with convolutions": not dd["resamp_with_conv"],
        "tanh_out and give_pre_end do not exist in diffusers": dd["tanh_out"] or dd["give_pre_end"],
        f"ch_mult begins with {dd['ch_mult'][0]}, in diffusers with 1": dd["ch_mult"][0] != 1,
        f"embed_dim {embed_dim} is not z_channels {dd['z_channels']}": dd["double_z"] and other_dim,
        "the codebook's indices are remapped": arguments.get("remap") is not None,
    }
    reasons = [reason for reason, applies in found.items() if applies]
    if reasons:
        raise NotExpressible("diffusers' autoencoders cannot hold this first stage", reasons)


def first_stage_part(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Target and params of the first stage that an `AutoencoderKL` or `VQModel` config describes.

    Raises:
        UnsupportedCheckpoint: something that the first stages here do not have.
    """
    kl = config["_class_name"] == "AutoencoderKL"
    known = (_DEFAULTS_KL, _FIXED_KL) if kl else (_DEFAULTS_VQ, _FIXED_VQ)
    reader = Reader(config, *known, _HARMLESS, where)
    ddconfig = _ddconfig(reader) | {"double_z": kl}
    if not kl:
        embed_dim = reader["vq_embed_dim"] or reader["latent_channels"]
        sizes = {"n_embed": reader["num_vq_embeddings"], "embed_dim": embed_dim}
        return node("models.autoencoder.VQModel", ddconfig=ddconfig, **sizes)
    if reader["use_quant_conv"] != reader["use_post_quant_conv"]:
        reader.refuse("use_quant_conv and use_post_quant_conv differ")
    if not reader["use_quant_conv"]:
        parts = {"encoder": ddconfig, "decoder": dict(ddconfig)}
        return node("models.autoencoding_engine.AutoencodingEngine", **parts, regularizer="kl")
    channels = reader["latent_channels"]
    return node("models.autoencoder.AutoencoderKL", ddconfig=ddconfig, embed_dim=channels)


def _ddconfig(reader: Reader) -> dict[str, Any]:
    widths = reader["block_out_channels"]
    levels = len(widths)
    attends, attends_up = ([kind.startswith("Attn") for kind in reader[key]] for key, _ in _BLOCKS)
    for key, kinds in _BLOCKS:
        if not set(reader[key]) <= set(kinds.values()):
            reader.refuse_value(key, f"known are {', '.join(kinds.values())}")
    if len(attends) != levels or attends != attends_up[::-1]:
        reader.refuse("attention lies at other levels in the encoder than in the decoder")
    if any(width % widths[0] for width in widths):
        reader.refuse_value("block_out_channels", "are no multiples of the first")
    if any(attends) and not reader["mid_block_add_attention"]:
        reader.refuse("there is attention at the levels, but none in the middle")
    # Only the levels count, not the pixels: any size whose halves stay whole will do.
    sample = reader["sample_size"]
    resolution = max(sample if isinstance(sample, int) else 0, 2 ** (levels - 1))
    return {
        "z_channels": reader["latent_channels"],
        "resolution": resolution,
        "in_channels": reader["in_channels"],
        "out_ch": reader["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": reader["layers_per_block"],
        "attn_resolutions": [resolution // 2**i for i, attending in enumerate(attends) if attending],
        "attn_type": "vanilla" if reader["mid_block_add_attention"] else "none",
        "dropout": 0.0,
        "num_groups": reader["norm_num_groups"],
    }


def latent_scale(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """(shift, scale) of the latents, z = (latent - shift) * scale; one value for all channels or for each.

    `latents_mean` and `latents_std` are used as diffusers' SDXL pipelines use them:
    latent = z * latents_std / scaling_factor + latents_mean.
    """
    scale = config.get("scaling_factor", _DEFAULTS["scaling_factor"])
    shift = config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return [float(shift)], [float(scale)]
    return [float(m) for m in mean], [float(scale) / float(s) for s in std]


def scale_config(shift: list[float], scale: list[float], one_number: bool) -> dict[str, Any]:
    """The inverse of `latent_scale`, from one value for each channel.

    Args:
        one_number: the class has `scaling_factor` only (VQModel); where that does not say it all, it is 1.
    """
    uniform = len(set(shift)) == len(set(scale)) == 1
    if one_number:
        return {"scaling_factor": scale[0] if uniform and not shift[0] else 1.0}
    if uniform:
        return {"scaling_factor": scale[0], "shift_factor": shift[0] or None}
    return {"scaling_factor": 1.0, "latents_mean": shift, "latents_std": [1 / s for s in scale]}
