"""The arguments from which a built network would be built again, read off its modules.

Exporters describe a network to other projects with these, however the network itself came to be: from a
run, a published checkpoint or a line of code.
"""

from collections.abc import Iterable

from torch import nn

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.models.autoencoding_engine import AutoencodingEngine
from ldm.models.quantize import VectorQuantizer
from ldm.models.unet import UNetModel
from ldm.nn.attention import AttentionBlock, AttnBlock, LinAttnBlock
from ldm.nn.channel_attention import CBAM, EfficientChannelAttention, SqueezeExcitation
from ldm.nn.resblock import DownsampleND, TimestepResBlock
from ldm.nn.transformer import SpatialTransformer

_ATTENTION_TYPES = {
    AttnBlock: "vanilla",
    LinAttnBlock: "linear",
    SqueezeExcitation: "se",
    CBAM: "cbam",
    EfficientChannelAttention: "eca",
    nn.Identity: "none",
}


class NotExpressible(ValueError):
    """A format has no place for something in a model; `reasons` lists everything that does not fit."""

    def __init__(self, what: str, reasons: Iterable[str]):
        self.reasons = list(reasons)
        super().__init__(f"{what}: " + "; ".join(self.reasons))


def unet_arguments(unet: UNetModel) -> dict:
    """Keyword arguments of `UNetModel` that give this network's parameters and function, as plain values."""
    middle = unet.middle_block[0]
    attentions = attention_layers(unet)
    transformers = [layer for layer in attentions if isinstance(layer, SpatialTransformer)]
    resamplers = [block[-1] for block in unet.input_blocks if _resamples(block[-1])]
    centre = unet.middle_block[1]
    plain = [layer for layer in attentions if isinstance(layer, AttentionBlock)]
    return {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "num_res_blocks": list(unet.num_res_blocks),
        "attention_resolutions": list(unet.attention_resolutions),
        "dropout": middle.out_layers[2].p,
        "channel_mult": [_ratio(width, unet.model_channels) for width in unet.widths],
        "conv_resample": all(not isinstance(r, DownsampleND) or _learned(r) for r in resamplers),
        "dims": unet.dims,
        "num_classes": unet.num_classes,
        "adm_in_channels": unet.adm_in_channels,
        "use_checkpoint": middle.use_checkpoint,
        **_heads(unet),
        "use_scale_shift_norm": middle.use_scale_shift_norm,
        "resblock_updown": any(isinstance(r, TimestepResBlock) for r in resamplers),
        "use_new_attention_order": any(layer.attention.layout.startswith("(three") for layer in plain),
        "use_spatial_transformer": bool(transformers),
        "transformer_depth": list(unet.depths),
        "transformer_depth_middle": (
            len(centre.transformer_blocks) if isinstance(centre, SpatialTransformer) else None
        ),
        "context_dim": _plain(unet.context_dim),
        "use_linear_in_transformer": any(layer.use_linear for layer in transformers),
        "disable_self_attentions": (
            list(unet.disable_self_attentions) if any(unet.disable_self_attentions) else None
        ),
        "num_attention_blocks": _plain(unet.num_attention_blocks),
        "disable_middle_self_attn": isinstance(centre, SpatialTransformer)
        and any(block.disable_self_attn for block in centre.transformer_blocks),
        "disable_middle_transformer": unet.attn_type == "attention" and isinstance(centre, nn.Identity),
        "n_embed": unet.id_predictor[1].out_channels if unet.predict_codebook_ids else None,
        "num_groups": middle.in_layers[0].num_groups,
        "attn_type": unet.attn_type,
        "attn_options": dict(unet.attn_options) or None,
    }  # fmt: skip


def _plain(value):
    return value if value is None or isinstance(value, int) else list(value)


def attention_layers(unet: UNetModel) -> list[nn.Module]:
    """Every SpatialTransformer and AttentionBlock, in the order of the forward pass."""
    return [m for m in unet.modules() if isinstance(m, SpatialTransformer | AttentionBlock)]


def head_layout(layer: nn.Module) -> tuple[int, int] | None:
    """(number of heads, channels of each) of an attention layer; None for a transformer without blocks."""
    if isinstance(layer, AttentionBlock):
        return layer.attention.num_heads, layer.qkv.in_channels // layer.attention.num_heads
    if not len(layer.transformer_blocks):
        return None
    attention = layer.transformer_blocks[0].attn1
    return attention.heads, attention.to_q.out_features // attention.heads


def layer_width(layer: nn.Module) -> int:
    """Channels of the feature map that an attention layer works on."""
    return layer.norm.num_channels


def _resamples(layer: nn.Module) -> bool:
    moves = isinstance(layer, TimestepResBlock) and not isinstance(layer.h_upd, nn.Identity)
    return moves or isinstance(layer, DownsampleND)


def _learned(layer: DownsampleND) -> bool:
    return bool(list(layer.parameters()))


def _ratio(width: int, base: int) -> int | float:
    """The multiplier that `UNetModel` turns into `width`: int(ratio * base) == width."""
    if width % base == 0:
        return width // base
    ratio = width / base
    return ratio if int(ratio * base) == width else (width + 0.5) / base


def _heads(unet: UNetModel) -> dict:
    """`num_heads`, `num_head_channels` (with `num_heads_upsample` and `legacy` where they matter)."""
    encoder = [*attention_layers(unet.input_blocks), *attention_layers(unet.middle_block)]
    found = _common_heads(encoder + attention_layers(unet.output_blocks))
    if found is not None:
        return found
    first, second = _common_heads(encoder), _common_heads(attention_layers(unet.output_blocks))
    if first is None or second is None or "num_heads" not in first or "num_heads" not in second:
        raise NotExpressible("UNetModel", ["its attention heads follow no rule of its arguments"])
    return {"num_heads": first["num_heads"], "num_heads_upsample": second["num_heads"]}


def _common_heads(layers: list[nn.Module]) -> dict | None:
    """The one rule that gives every layer's heads from its width, or None."""
    layouts = [(layer_width(layer), *head_layout(layer)) for layer in layers if head_layout(layer)]
    if not layouts:
        return {"num_heads": 1}
    _, heads, channels = layouts[0]
    if all(h == heads and w == h * c for w, h, c in layouts):
        return {"num_heads": heads}
    if all(c == channels and h == w // c for w, h, c in layouts):
        return {"num_head_channels": channels, "legacy": False}
    for asked in range(1, max(w for w, _, _ in layouts) + 1):  # a remainder is spread over the heads
        if all(asked <= w and h == w // asked and c == w // h for w, h, c in layouts):
            return {"num_head_channels": asked, "legacy": True}
    return None


def first_stage_arguments(model: nn.Module, resolution: int | None = None) -> dict:
    """Keyword arguments of an `AutoencoderKL`, `VQModel`, `AutoencodingEngine` or `IdentityFirstStage`.

    `resolution` is the size in pixels by which `attn_resolutions` counts; it leaves no trace in the modules.

    Raises:
        NotExpressible: another class, or an encoder and a decoder of different sizes.
    """
    if isinstance(model, IdentityFirstStage):
        return {"channels": model.image_channels}
    if isinstance(model, AutoencoderKL):
        return {"ddconfig": _ddconfig(model, True, resolution), "embed_dim": model.latent_channels}
    if isinstance(model, AutoencodingEngine) and model.regularizer == "kl":
        ddconfig = _ddconfig(model, True, resolution)
        return {"encoder": ddconfig, "decoder": dict(ddconfig), "regularizer": "kl"}
    if isinstance(model, VQModel):
        return {"ddconfig": _ddconfig(model, False, resolution), **_quantizer(model.quantize)}
    raise NotExpressible(type(model).__name__, ["is no first stage that is known here"])


def _quantizer(quantizer: VectorQuantizer) -> dict:
    remap = {}
    if quantizer.remap is not None:
        remap = {"remap": quantizer.used.tolist(), "unknown_index": quantizer.unknown_index}
    return {
        "n_embed": quantizer.n_embed,
        "embed_dim": quantizer.embed_dim,
        "beta": quantizer.beta,
        "legacy": quantizer.legacy,
        "sane_index_shape": quantizer.sane_index_shape,
        **remap,
    }


def attending_levels(model: nn.Module) -> list[bool]:
    """For each level of the encoder, from the highest resolution down, whether it has attention."""
    return [len(level.attn) > 0 for level in model.encoder.down]


def _ddconfig(model: nn.Module, double_z: bool, resolution: int | None) -> dict:
    encoder, decoder = model.encoder, model.decoder
    ch = encoder.conv_in.out_channels
    attends = attending_levels(model)
    if _sizes(encoder.down, encoder.mid, 0) != _sizes(decoder.up, decoder.mid, 1):
        raise NotExpressible(type(model).__name__, ["its decoder is no mirror image of its encoder"])
    smallest = 2 ** (len(attends) - 1)
    resolution = 16 * smallest if resolution is None else max(resolution, smallest)
    resamplers = [level.downsample for level in encoder.down if hasattr(level, "downsample")]
    return {
        "double_z": double_z,
        "z_channels": decoder.z_channels,
        "resolution": resolution,
        "in_channels": encoder.in_channels,
        "out_ch": decoder.conv_out.out_channels,
        "ch": ch,
        "ch_mult": [level.block[-1].conv2.out_channels // ch for level in encoder.down],
        "num_res_blocks": len(encoder.down[0].block),
        "attn_resolutions": [resolution // 2**i for i, attending in enumerate(attends) if attending],
        "dropout": encoder.down[0].block[0].dropout.p,
        "resamp_with_conv": all(r.with_conv for r in resamplers),
        "attn_type": _ATTENTION_TYPES[type(encoder.mid.attn_1)],
        "attn_options": dict(encoder.attn_options) or None,
        "give_pre_end": decoder.give_pre_end,
        "tanh_out": decoder.tanh_out,
        "num_groups": encoder.norm_out.num_groups,
    }


def _sizes(levels: Iterable[nn.Module], middle: nn.Module, more_blocks: int) -> tuple:
    """What encoder and decoder share: the middle's attention; width, blocks and attention of each level."""
    return type(middle.attn_1), [
        (level.block[-1].conv2.out_channels, len(level.block) - more_blocks, len(level.attn) > 0)
        for level in levels
    ]
