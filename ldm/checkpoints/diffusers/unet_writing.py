"""The UNet as diffusers' `UNet2DModel` (AttentionBlocks) or `UNet2DConditionModel` (SpatialTransformers).

What only one side has is refused with its reason.
"""

from typing import Any

from torch import nn

from ldm.arguments import arguments_of
from ldm.checkpoints.description import NotExpressible
from ldm.models.unet import UNetModel
from ldm.nn.transformer import SpatialTransformer

#: The only values that the UNet here can have.
FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
}


def unet_config(
    unet: nn.Module, sample_size: int | list[int] | None = None, class_table: int | None = None
) -> dict[str, Any]:
    """The config of the class that holds this UNet, `_class_name` included.

    Args:
        sample_size: of the latents, where it is known.
        class_table: rows of a table of class embeddings that takes the place of the network for `y`.

    Raises:
        NotExpressible: with everything that the class does not have.
    """
    if type(unet) is not UNetModel:
        reasons = ["its UNets are UNetModels here, and its DiT embeds the time at other frequencies"]
        raise NotExpressible(f"diffusers has no class for this {type(unet).__name__}", reasons)
    made, transformers = arguments_of(unet), has_transformers(unet)
    name = "UNet2DConditionModel" if transformers else "UNet2DModel"
    attends = [2**level in unet.attention_resolutions for level in range(len(unet.widths))]
    reasons = _common_reasons(unet, made, attends)
    specific = _condition_config if transformers else _plain_config
    attending = "CrossAttnDownBlock2D" if transformers else "AttnDownBlock2D"
    plain = "ResnetDownsampleBlock2D" if made["resblock_updown"] else "DownBlock2D"
    blocks = [attending if attention else plain for attention in attends]
    config = {
        "_class_name": name,
        "sample_size": sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": list(unet.widths),
        "down_block_types": blocks,
        "up_block_types": [block.replace("Down", "Up") for block in reversed(blocks)],
        "dropout": made["dropout"],
        "norm_num_groups": made["num_groups"],
        "resnet_time_scale_shift": "scale_shift" if made["use_scale_shift_norm"] else "default",
        **FIXED,
        **specific(unet, made, attends, reasons),
        **_label_config(unet.num_classes if class_table is None else class_table, unet.adm_in_channels),
    }
    if not transformers and "projection_class_embeddings_input_dim" in config:
        reasons.append(
            f'num_classes="{unet.num_classes}" needs a projection of y, which only transformers have'
        )
    if reasons:
        raise NotExpressible(f"diffusers' {name} cannot hold this UNet", reasons)
    return config


def _common_reasons(unet: UNetModel, made: dict, attends: list[bool]) -> list[str]:
    """What neither class has."""
    partly = unet.num_attention_blocks is not None and any(attends)
    fixed = {"dims": 2, "attn_type": "attention", "n_embed": None, "conv_resample": True}
    reasons = [
        f"{name} is {made[name]!r}, not {only!r}" for name, only in fixed.items() if made[name] != only
    ]
    if unet.widths[0] != unet.model_channels:
        reasons.append(f"level 0 is {unet.widths[0]} wide, model_channels is {unet.model_channels}")
    return reasons + ["num_attention_blocks leaves some of a level's blocks without attention"] * partly


def _plain_config(unet: UNetModel, made: dict, attends: list[bool], reasons: list[str]) -> dict[str, Any]:
    """What is particular to `UNet2DModel`; adds to `reasons`."""
    if len(set(unet.num_res_blocks)) > 1:
        reasons.append(f"num_res_blocks differs between levels ({unet.num_res_blocks}), of which it has one")
    resampling = "resnet" if made["resblock_updown"] else "conv"
    return {
        "mid_block_type": "UNetMidBlock2D",
        "add_attention": not made["disable_middle_transformer"],
        "layers_per_block": unet.num_res_blocks[0],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": _channels_of_heads(unet, made, attends, reasons),
        # Left out, it would be no norm at all with resnet_time_scale_shift="scale_shift".
        "attn_norm_num_groups": made["num_groups"],
    }


def _heads(unet: UNetModel, made: dict, attends: list[bool]) -> set[tuple[int, int, int]]:
    """(width, number of heads, channels of each) of every attention layer."""
    widths = {width for width, attending in zip(unet.widths, attends, strict=True) if attending}
    widths |= set() if made["disable_middle_transformer"] else {unet.widths[-1]}
    asked = made["num_head_channels"]
    if asked == -1:
        counts = {made["num_heads"]} | ({made["num_heads_upsample"]} - {-1} if any(attends) else set())
        return {(width, count, width // count) for width in widths for count in counts}
    counts = {width: width // asked for width in widths}
    return {(width, n, width // n if made["legacy"] else asked) for width, n in counts.items()}


def _channels_of_heads(unet: UNetModel, made: dict, attends: list[bool], reasons: list[str]) -> int | None:
    """UNet2DModel's `attention_head_dim`: channels of a head, the same everywhere; None is one head each."""
    layouts = _heads(unet, made, attends)
    channels = {c for _, _, c in layouts}
    if len(channels) <= 1:
        return channels.pop() if channels else 8
    if any(heads != 1 for _, heads, _ in layouts):
        differ = ", ".join(map(str, sorted(channels)))
        reasons.append(f"the channels of a head differ ({differ}), unlike with num_head_channels")
    return None


def _condition_config(unet: UNetModel, made: dict, attends: list[bool], reasons: list[str]) -> dict[str, Any]:
    """What is particular to `UNet2DConditionModel`; adds to `reasons`."""
    middle = ("disable_middle_transformer", "disable_middle_self_attn")
    reasons += [f"{name}, which it has not" for name in middle if made[name]]
    if made["resblock_updown"] and len(unet.widths) > 1 and any(attends):
        reasons.append("resblock_updown with cross-attention, whose blocks resample with convolutions only")
    if not isinstance(unet.context_dim, int):
        reasons.append(f"context_dim is {unet.context_dim}; its transformers need one context for all blocks")
    depths, middle = list(unet.depths), made["transformer_depth_middle"]
    if not attends[-1] and middle is not None:
        depths[-1] = middle  # diffusers gives it to the middle; the last level has no transformer itself
    elif middle not in (None, depths[-1]):
        reasons.append(f"the middle's transformer has depth {middle}, the last level's {depths[-1]}")
    return {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": list(unet.num_res_blocks),
        "transformer_layers_per_block": depths,
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": _heads_of_levels(unet, made, attends, reasons),
        "use_linear_projection": made["use_linear_in_transformer"],
        "only_cross_attention": list(unet.disable_self_attentions),
        "mid_block_only_cross_attention": False,
    }


def _heads_of_levels(unet: UNetModel, made: dict, attends: list[bool], reasons: list[str]) -> list[int]:
    """UNet2DConditionModel's `attention_head_dim`: despite its name the number of heads at each level."""
    heads_at = {}
    for width, heads, channels in sorted(_heads(unet, made, attends)):
        if channels != width // heads:
            reasons.append(f"{heads} heads of {channels} channels at width {width} leave some out")
        heads_at[width] = heads
    return [heads_at.get(width, 1) for width in unet.widths]


def _label_config(num_classes: int | str | None, length: int | None) -> dict[str, Any]:
    kinds = {
        None: {},
        "timestep": {"class_embed_type": "timestep"},
        "sequential": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": length},
        "continuous": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 1},
    }
    return kinds.get(num_classes, {"num_class_embeds": num_classes})


def has_transformers(unet: UNetModel) -> bool:
    """Whether it is a UNet2DConditionModel in diffusers."""
    return any(isinstance(layer, SpatialTransformer) for layer in unet.modules())
