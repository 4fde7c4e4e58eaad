"""Configs of diffusers' `UNet2DModel` and `UNet2DConditionModel` in the terms of our UNet.

What only one side has is refused with its reason.
"""

from collections.abc import Mapping
from typing import Any

from ldm.checkpoints.description import node
from ldm.checkpoints.diffusers.model_config import Reader, choice
from ldm.checkpoints.diffusers.unet_writing import FIXED

CLASSES = ("UNet2DModel", "UNet2DConditionModel")

_FIXED_CONDITION = {
    **FIXED,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "attention_type": "default",
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), 3),
    **dict.fromkeys(("dual_cross_attention", "resnet_skip_time_act", "class_embeddings_concat"), False),
    **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads"), None),
    **dict.fromkeys(("time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim"), None),
    "cross_attention_norm": None,
}
_FIXED_PLAIN = {**FIXED, "mid_block_type": "UNetMidBlock2D"}
_DEFAULTS = {
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "default",
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "time_embedding_dim")),
}
_DEFAULTS_PLAIN = {
    **_DEFAULTS,
    **dict.fromkeys(("in_channels", "out_channels"), 3),
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    **dict.fromkeys(("downsample_type", "upsample_type"), "conv"),
    "attn_norm_num_groups": None,
    "add_attention": True,
}
_DEFAULTS_CONDITION = {
    **_DEFAULTS,
    **dict.fromkeys(("in_channels", "out_channels"), 4),
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    **dict.fromkeys(("only_cross_attention", "use_linear_projection"), False),
    **dict.fromkeys(("reverse_transformer_layers_per_block", "projection_class_embeddings_input_dim")),
    **dict.fromkeys(("addition_embed_type", "addition_time_embed_dim")),
}
# Sizes of inputs, and precisions: of no effect on what the network computes.
_HARMLESS = frozenset(
    {"sample_size", "image_size", "num_train_timesteps", "upcast_attention", "mid_block_only_cross_attention",
     "addition_embed_type_num_heads"}
)  # fmt: skip

_SCALE_SHIFT = {"default": False, "scale_shift": True}
# Block type -> (attention, kind of resampling; "as asked" follows downsample_type and upsample_type).
_DOWN = {
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, "as asked"),
    "CrossAttnDownBlock2D": (True, "conv"),
}
_UP = {name.replace("Down", "Up"): kind for name, kind in _DOWN.items()}


def unet_part(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Target and params of the UNet that a `UNet2DModel` or `UNet2DConditionModel` config describes.

    Raises:
        UnsupportedCheckpoint: something that `UNetModel` does not have.
    """
    condition = config["_class_name"] == "UNet2DConditionModel"
    known = (_DEFAULTS_CONDITION, _FIXED_CONDITION) if condition else (_DEFAULTS_PLAIN, _FIXED_PLAIN)
    reader = Reader(config, *known, _HARMLESS, where)
    widths = list(reader["block_out_channels"])
    if reader["time_embedding_dim"] not in (None, 4 * widths[0]):
        reader.refuse_value("time_embedding_dim", "is not 4 times the width of level 0")
    attends, updown = _levels(reader, len(widths), condition)
    multiples = [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths]
    if [int(multiple * widths[0]) for multiple in multiples] != widths:
        reader.refuse_value("block_out_channels", "are no multiples of the first")
    params = {
        "in_channels": reader["in_channels"],
        "out_channels": reader["out_channels"],
        "model_channels": widths[0],
        "channel_mult": multiples,
        "num_res_blocks": reader.integers("layers_per_block", len(widths)),
        "attention_resolutions": [2**level for level, attending in enumerate(attends) if attending],
        "dropout": reader["dropout"],
        "num_groups": reader["norm_num_groups"],
        "use_scale_shift_norm": choice(reader, "resnet_time_scale_shift", _SCALE_SHIFT, reader.where),
        "resblock_updown": updown,
        "use_spatial_transformer": condition,
        **(_condition_params if condition else _plain_params)(reader, widths, attends),
    }
    return node("models.unet.UNetModel", **params)


def _levels(reader: Reader, levels: int, condition: bool) -> tuple[list[bool], bool]:
    """(attention at each level, whether residual blocks change the resolution)."""
    attention = "CrossAttn" if condition else "Attn"
    down, up = reader["down_block_types"], reader["up_block_types"]
    for kinds, table in ((down, _DOWN), (up, _UP)):
        allowed = [k for k, (attends, _) in table.items() if not attends or k.startswith(attention)]
        unknown = [kind for kind in kinds if kind not in allowed]
        if unknown or len(kinds) != levels:
            reader.refuse(f"block types {', '.join(kinds)}; known are {', '.join(allowed)}, {levels} of them")
    attends = [_DOWN[kind][0] for kind in down]
    if attends != [_UP[kind][0] for kind in up][::-1]:
        reader.refuse("attention lies at other levels in the encoder than in the decoder")
    # The last level only ever goes up, the first only down.
    ways = {_DOWN[kind][1] for kind in down[:-1]} | {_UP[kind][1] for kind in up[:-1]}
    if "as asked" in ways:
        ways = (ways - {"as asked"}) | {reader["downsample_type"], reader["upsample_type"]}
    if len(ways) > 1 or not ways <= {"conv", "resnet"}:
        reader.refuse(f"the resolution changes in different ways ({', '.join(sorted(map(str, ways)))})")
    return attends, ways == {"resnet"}


def _plain_params(reader: Reader, widths: list[int], attends: list[bool]) -> dict[str, Any]:
    channels = reader["attention_head_dim"]
    used = {width for width, attending in zip(widths, attends, strict=True) if attending} | {widths[-1]}
    if channels is not None and any(width % channels for width in used):
        reader.refuse_value("attention_head_dim", f"does not divide all of the widths {sorted(used)}")
    groups = reader["attn_norm_num_groups"]
    if reader["add_attention"] and (groups or reader["norm_num_groups"]) != reader["norm_num_groups"]:
        reader.refuse_value("attn_norm_num_groups", f"is not norm_num_groups={reader['norm_num_groups']}")
    scale_shift = choice(reader, "resnet_time_scale_shift", _SCALE_SHIFT, reader.where)
    if reader["add_attention"] and groups is None and scale_shift:
        reader.refuse("the middle's attention has no norm (scale_shift without attn_norm_num_groups)")
    if reader["class_embed_type"] not in (None, "timestep"):
        reader.refuse_value("class_embed_type")
    classes = "timestep" if reader["class_embed_type"] else reader["num_class_embeds"]
    heads = {"num_heads": 1} if channels is None else {"num_head_channels": channels}
    return {"disable_middle_transformer": not reader["add_attention"], "num_classes": classes, **heads}


def _condition_params(reader: Reader, widths: list[int], attends: list[bool]) -> dict[str, Any]:
    levels = len(widths)
    context = set(reader.integers("cross_attention_dim", levels))
    if len(context) > 1:
        reader.refuse_value("cross_attention_dim", "differs between levels")
    depths = reader.integers("transformer_layers_per_block", levels)
    mirrored = reader["reverse_transformer_layers_per_block"]
    if mirrored is not None and list(mirrored) != depths[::-1]:
        reader.refuse(f"transformers of depth {depths} in the encoder and {mirrored} in the decoder")
    only_cross = reader["only_cross_attention"]
    only_cross = [only_cross] * levels if isinstance(only_cross, bool) else list(only_cross)
    return {
        **_level_heads(reader, widths, attends),
        "context_dim": context.pop(),
        "transformer_depth": depths,
        "transformer_depth_middle": depths[-1],
        "use_linear_in_transformer": reader["use_linear_projection"],
        "disable_self_attentions": only_cross if any(only_cross) else None,
        **_labels(reader),
    }


def _level_heads(reader: Reader, widths: list[int], attends: list[bool]) -> dict[str, int]:
    """`num_heads` or `num_head_channels`; attention_head_dim is the number of heads, despite its name."""
    heads = reader.integers("attention_head_dim", len(widths))
    used = [(w, h) for w, h, attending in zip(widths, heads, attends, strict=True) if attending]
    used.append((widths[-1], heads[-1]))  # the middle
    if any(width % count for width, count in used):
        reader.refuse_value("attention_head_dim", f"(numbers of heads) do not divide the widths {widths}")
    if len({count for _, count in used}) == 1:
        return {"num_heads": used[0][1]}
    channels = {width // count for width, count in used}
    if len(channels) > 1:
        reader.refuse_value("attention_head_dim", "gives neither one number of heads nor one size of them")
    return {"num_head_channels": channels.pop()}


def _labels(reader: Reader) -> dict[str, Any]:
    kind, addition = reader["class_embed_type"], reader["addition_embed_type"]
    length = reader["projection_class_embeddings_input_dim"]
    if addition is not None and (addition != "text_time" or kind is not None or reader["num_class_embeds"]):
        reader.refuse_value("addition_embed_type", f"with class_embed_type={kind!r}")
    if addition == "text_time" or kind == "projection":
        return {"num_classes": "sequential", "adm_in_channels": length}
    if kind == "simple_projection" and length == 1:
        return {"num_classes": "continuous"}
    if kind == "timestep":
        return {"num_classes": "timestep"}
    if kind is not None:
        reader.refuse_value("class_embed_type")
    return {} if reader["num_class_embeds"] is None else {"num_classes": reader["num_class_embeds"]}
