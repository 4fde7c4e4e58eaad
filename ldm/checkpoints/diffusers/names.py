"""Parameter names here and in the library diffusers, for the first stages and the UNet.

A built network is walked block by block, so that every name follows from indices: which level, which layer,
which kind. Names and layouts are those of `AutoencoderKL`, `VQModel`, `UNet2DModel` and
`UNet2DConditionModel` (https://github.com/huggingface/diffusers).
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
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
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
    """Our name -> place in diffusers, for every parameter of a UNet or a first stage."""
    return unet_places(model, class_name) if isinstance(model, UNetModel) else first_stage_places(model)


def first_stage_places(model: nn.Module) -> Places:
    """Our name -> place in `AutoencoderKL` or `VQModel`, for every parameter of a first stage."""
    kept = ("quant_conv", "post_quant_conv", "quantize")
    places = {name: Place((name,)) for name, _ in model.named_parameters() if name.split(".")[0] in kept}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        network = getattr(model, half)
        for leaf, theirs in (("conv_in",) * 2, ("conv_out",) * 2, ("norm_out", "conv_norm_out")):
            _same_leaves(places, getattr(network, leaf), f"{half}.{leaf}", f"{half}.{theirs}")
        for layer, theirs in _MIDDLE.items():
            _layer(places, getattr(network.mid, layer), f"{half}.mid.{layer}", f"{half}.mid_block.{theirs}")
        levels = list(getattr(network, way))
        for i, level in enumerate(levels):
            ours = f"{half}.{way}.{i}"
            block = f"{half}.{way}_blocks.{i if way == 'down' else len(levels) - 1 - i}"
            for kind, theirs in (("block", "resnets"), ("attn", "attentions")):
                for j, layer in enumerate(getattr(level, kind)):
                    _layer(places, layer, f"{ours}.{kind}.{j}", f"{block}.{theirs}.{j}")
            sampler = f"{way}sample"
            if hasattr(level, sampler):
                _same_leaves(places, getattr(level, sampler), f"{ours}.{sampler}", f"{block}.{sampler}rs.0")
    return places


def unet_places(unet: UNetModel, class_name: str = "class_embedding") -> Places:
    """Our name -> place in `UNet2DModel` or `UNet2DConditionModel`, for every parameter of a UNet.

    `class_name` is where the network for `y` lies: `class_embedding`, or SDXL's `add_embedding`.
    """
    places: Places = {}
    for ours, theirs in _ENDS.items():
        _same_leaves(places, unet.get_submodule(ours), ours, theirs)
    if unet.num_classes is not None:
        for ours, theirs in _LABELS.get(unet.num_classes, {"label_emb": ""}).items():
            _same_leaves(places, unet.get_submodule(ours), ours, class_name + theirs)
    for index, (level, layer) in enumerate(_encoder_positions(unet), start=1):
        block = unet.input_blocks[index]
        _sequence(places, block, f"input_blocks.{index}", f"down_blocks.{level}", layer)
    for index, theirs in enumerate(_MIDDLE.values()):
        _layer(places, unet.middle_block[index], f"middle_block.{index}", f"mid_block.{theirs}")
    for index, (level, layer) in enumerate(_decoder_positions(unet)):
        block = unet.output_blocks[index]
        _sequence(places, block, f"output_blocks.{index}", f"up_blocks.{level}", layer)
    return places


def _encoder_positions(unet: UNetModel) -> Iterator[tuple[int, int | None]]:
    """(level, index within it) of each input block after the first; None where only the size changes."""
    for level, count in enumerate(unet.num_res_blocks):
        yield from ((level, layer) for layer in range(count))
        if level < len(unet.num_res_blocks) - 1:
            yield level, None


def _decoder_positions(unet: UNetModel) -> Iterator[tuple[int, int]]:
    """(level counted from the lowest resolution, index within it) of each output block."""
    for level, count in enumerate(reversed(unet.num_res_blocks)):
        yield from ((level, layer) for layer in range(count + 1))


def _sequence(places: Places, block: nn.Module, ours: str, theirs: str, layer: int | None) -> None:
    """The layers of one input or output block: a residual block, attention, a change of size."""
    for position, module in enumerate(block):
        name = f"{ours}.{position}"
        if isinstance(module, SpatialTransformer | AttentionBlock):
            _layer(places, module, name, f"{theirs}.attentions.{layer}")
        elif isinstance(module, TimestepResBlock) and isinstance(module.h_upd, nn.Identity):
            _layer(places, module, name, f"{theirs}.resnets.{layer}")
        else:
            up = isinstance(module, UpsampleND) or isinstance(getattr(module, "h_upd", None), UpsampleND)
            _layer(places, module, name, f"{theirs}.{'upsamplers' if up else 'downsamplers'}.0")


def _layer(places: Places, module: nn.Module, ours: str, theirs: str) -> None:
    """Every parameter of one layer."""
    for name, _ in module.named_parameters():
        stem, _, leaf = name.rpartition(".")
        match module:
            case TimestepResBlock() | ResBlock():
                place = Place((f"{theirs}.{_RES[stem]}.{leaf}",))
            case AttentionBlock() if stem == "qkv":
                legacy = module.attention.layout.startswith("(heads")
                heads = module.attention.num_heads if legacy else 1
                place = Place(tuple(f"{theirs}.{part}.{leaf}" for part in _QKV), True, heads)
            case AttnBlock() | AttentionBlock():
                place = Place((f"{theirs}.{_ATTN[stem]}.{leaf}",), linear=stem != "norm")
            case SpatialTransformer():
                place = Place((f"{theirs}.{name}",))
            case DownsampleND() | UpsampleND():
                place = Place((f"{theirs}.conv.{leaf}",))
            case _:
                raise ValueError(f"{ours} is a {type(module).__name__}, which has no name in diffusers")
        places[f"{ours}.{name}"] = place


def _same_leaves(places: Places, module: nn.Module, ours: str, theirs: str) -> None:
    for name, _ in module.named_parameters():
        places[f"{ours}.{name}"] = Place((f"{theirs}.{name}",))


def to_diffusers(tensors: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """Our tensors under the names and in the shapes of diffusers.

    Raises:
        KeyError: a tensor without a place; nothing is left out silently.
    """
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

    Args:
        shapes: of our parameters.
        where, class_name: the file and the class of diffusers, for messages.

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
