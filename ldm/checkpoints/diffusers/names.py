"""Parameter names here and in the library diffusers, for the first stages and the UNet.

Every name follows from indices: which level, which layer, which kind. Names and layouts are those of
`AutoencoderKL`, `VQModel`, `UNet2DModel`, `UNet2DConditionModel` (https://github.com/huggingface/diffusers).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.checkpoints.strict import check_keys
from ldm.models.unet import UNetModel
from ldm.nn.attention import AttentionBlock, AttnBlock
from ldm.nn.resblock import DownsampleND, ResBlock, TimestepResBlock, UpsampleND
from ldm.nn.transformer import SpatialTransformer


@dataclass(frozen=True)
class Place:
    """Where one parameter of ours is in diffusers.

    theirs: its name; three names (q, k, v) for a stacked projection.
    linear: the weight of a 1x1 convolution here is that of a linear layer there.
    heads: of a stacked projection, in how many groups q, k and v take turns here: the number of heads in the
        legacy order, 1 in the new one. diffusers has all heads' q, then k, then v.
    """

    theirs: tuple[str, ...]
    linear: bool = False
    heads: int = 1

    def encode(self, tensor: Tensor) -> list[Tensor]:
        """Our tensor as diffusers has it, one for each name."""
        if len(self.theirs) == 1:
            parts = [tensor]
        else:
            rows = len(tensor) // 3
            grouped = tensor.reshape(self.heads, 3, rows // self.heads, *tensor.shape[1:])
            parts = [grouped[:, i].reshape(rows, *tensor.shape[1:]) for i in range(3)]
        return [part.flatten(1) if self.linear and part.ndim > 1 else part for part in parts]

    def decode(self, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The inverse of `encode`, for our parameter of this shape."""
        if len(parts) == 1:
            return parts[0].reshape(shape)
        rows = shape[0] // 3
        grouped = [part.reshape(self.heads, 1, rows // self.heads, *shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).reshape(shape)


Places = dict[str, Place]

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Residual blocks: of the UNet, then of the first stages.
_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "nin_shortcut": "conv_shortcut",
}
_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
# The network for `y` by its kind; of any other, all is in one place.
_LABELS = {
    "timestep": {"label_emb.1.0": ".linear_1", "label_emb.1.2": ".linear_2"},
    "sequential": {"label_emb.0.0": ".linear_1", "label_emb.0.2": ".linear_2"},
}
_ATTN = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_QKV = ("to_q", "to_k", "to_v")
# Names of an attention layer's projections in folders written before diffusers 0.16.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def places_of(model: nn.Module, class_name: str = "class_embedding") -> Places:
    """Our name -> place in diffusers, for every parameter of a UNet or a first stage.

    `class_name` is where the UNet's network for `y` lies: `class_embedding`, or SDXL's `add_embedding`.
    """
    unet = isinstance(model, UNetModel)
    return {
        f"{ours}.{name}": _place(layer, name, theirs)
        for ours, theirs in (_unet_layers(model, class_name) if unet else _first_stage_layers(model))
        for layer in [model.get_submodule(ours)]
        for name, _ in layer.named_parameters()
    }


def _first_stage_layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(our name, name in `AutoencoderKL` or `VQModel`) of each layer."""
    around = ("quant_conv", "post_quant_conv", "quantize")
    yield from ((name, name) for name in around if hasattr(model, name))
    for half, way in (("encoder", "down"), ("decoder", "up")):
        for ours, theirs in (("conv_in",) * 2, ("conv_out",) * 2, ("norm_out", "conv_norm_out")):
            yield f"{half}.{ours}", f"{half}.{theirs}"
        for ours, theirs in _MIDDLE.items():
            yield f"{half}.mid.{ours}", f"{half}.mid_block.{theirs}"
        levels = getattr(getattr(model, half), way)
        for i, level in enumerate(levels):
            ours = f"{half}.{way}.{i}"
            block = f"{half}.{way}_blocks.{i if way == 'down' else len(levels) - 1 - i}"
            for kind, theirs in (("block", "resnets"), ("attn", "attentions")):
                for j in range(len(getattr(level, kind))):
                    yield f"{ours}.{kind}.{j}", f"{block}.{theirs}.{j}"
            if hasattr(level, f"{way}sample"):
                yield f"{ours}.{way}sample", f"{block}.{way}samplers.0"


def _unet_layers(unet: UNetModel, class_name: str) -> Iterator[tuple[str, str]]:
    """(our name, name in `UNet2DModel` or `UNet2DConditionModel`) of each layer."""
    yield from _ENDS.items()
    if unet.num_classes is not None:
        for ours, theirs in _LABELS.get(unet.num_classes, {"label_emb": ""}).items():
            yield ours, class_name + theirs
    yield from ((f"middle_block.{i}", f"mid_block.{name}") for i, name in enumerate(_MIDDLE.values()))
    last = len(unet.num_res_blocks) - 1
    # Where each block lies: at the end of the encoder's levels but the last, one changes the size alone.
    down = [(i, j) for i, n in enumerate(unet.num_res_blocks) for j in range(n + (i < last))]
    up = [(i, j) for i, n in enumerate(reversed(unet.num_res_blocks)) for j in range(n + 1)]
    for blocks, positions, way in (("input_blocks", [None, *down], "down"), ("output_blocks", up, "up")):
        for index, position in enumerate(positions):
            for number, layer in enumerate(getattr(unet, blocks)[index] if position else ()):
                theirs = f"{way}_blocks.{position[0]}.{_kind(layer, position[1])}"
                yield f"{blocks}.{index}.{number}", theirs


def _kind(layer: nn.Module, number: int) -> str:
    """The name of a layer within a level of diffusers' UNets."""
    if isinstance(layer, SpatialTransformer | AttentionBlock):
        return f"attentions.{number}"
    if isinstance(layer, TimestepResBlock) and isinstance(layer.h_upd, nn.Identity):
        return f"resnets.{number}"
    return "upsamplers.0" if isinstance(getattr(layer, "h_upd", layer), UpsampleND) else "downsamplers.0"


def _place(layer: nn.Module, name: str, theirs: str) -> Place:
    """Of the parameter `name` of a layer that diffusers calls `theirs`."""
    stem, _, leaf = name.rpartition(".")
    match layer:
        case TimestepResBlock() | ResBlock():
            return Place((f"{theirs}.{_RES.get(stem, stem)}.{leaf}",))
        case AttentionBlock() if stem == "qkv":
            legacy = layer.attention.layout.startswith("(heads")
            heads = layer.attention.num_heads if legacy else 1
            return Place(tuple(f"{theirs}.{part}.{leaf}" for part in _QKV), True, heads)
        case AttnBlock() | AttentionBlock():
            return Place((f"{theirs}.{_ATTN[stem]}.{leaf}",), linear=stem != "norm")
        case DownsampleND() | UpsampleND():
            return Place((f"{theirs}.conv.{leaf}",))
    return Place((f"{theirs}.{name}",))


def to_diffusers(tensors: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """Our tensors under the names and in the shapes of diffusers; one without a place is a KeyError."""
    written = {}
    for name, tensor in tensors.items():
        place = places[name]
        written |= dict(zip(place.theirs, place.encode(tensor), strict=True))
    return written


def from_diffusers(
    tensors: Mapping[str, Tensor],
    places: Places,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    class_name: str,
) -> dict[str, Tensor]:
    """The tensors of a diffusers file under our names, every key of both sides accounted for.

    `shapes` are our parameters'; `where` and `class_name` are for messages.

    Raises:
        KeyMismatch: keys are missing, extra or of another shape, in the file's own names.
    """
    expected: dict[str, Tensor] = {}
    for name, place in places.items():
        rows, *rest = shapes[name]
        rest = [rest[0]] if place.linear and rest else rest
        for theirs in place.theirs:
            expected[theirs] = torch.empty(rows // len(place.theirs), *rest, device="meta")
    found = {_current(name): tensor for name, tensor in tensors.items()}
    for name, tensor in found.items():
        # Some older folders have a 1x1 convolution where a linear layer is expected.
        if name in expected and expected[name].ndim == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            found[name] = tensor.flatten(1)
    check_keys(expected, found, where=where, name=class_name)
    return {
        name: place.decode([found[n] for n in place.theirs], shapes[name]) for name, place in places.items()
    }


def _current(name: str) -> str:
    """Today's name of a parameter: attention layers once had other ones."""
    match name.split("."):
        case [*above, "attentions", index, part, leaf] if part in _FORMER:
            return ".".join([*above, "attentions", index, _FORMER[part], leaf])
    return name
