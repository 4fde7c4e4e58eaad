"""One part of a diffusers folder: a config, and the weights that belong to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints.diffusers import unet_reading, vae
from ldm.checkpoints.diffusers.model_config import CONFIG, explained, read_config
from ldm.checkpoints.diffusers.names import from_diffusers, places_of
from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.reading import INDEX, read_weights

FIRST_STAGES, NETWORKS = vae.CLASSES, unet_reading.CLASSES
CLASS_TABLE = "class_embedding.weight"
_STEM = "diffusion_pytorch_model"
_ENDINGS = (".safetensors", f".safetensors{INDEX}", ".bin", f".bin{INDEX}")
_PARTS = {
    **dict.fromkeys(FIRST_STAGES, vae.first_stage_part),
    **dict.fromkeys(NETWORKS, unet_reading.unet_part),
}


def part_tree(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Target and params of a part; one that is not built here is an UnsupportedCheckpoint."""
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _PARTS:
        what = f"is a {kind}" if kind else "names no _class_name, so it is no config of diffusers"
        raise UnsupportedCheckpoint(where, f"{what}; known are {', '.join(_PARTS)}")
    with explained(where):
        return _PARTS[kind](config, where)


def part_tensors(folder: Path, model: nn.Module, ema: bool, replaced: str | None = None) -> dict[str, Tensor]:
    """The weights in a part's folder, strictly, under the names of `model`.

    Parameters that begin with `replaced`, and the table of classes in their place, are left out.
    """
    file, config = weights_file(folder, ema), read_config(folder / CONFIG)
    where = "add_embedding" if config.get("addition_embed_type") == "text_time" else "class_embedding"
    places, tensors = places_of(model, where), dict(read_weights(file).tensors)
    if replaced is not None:
        places = {name: place for name, place in places.items() if not name.startswith(replaced)}
        tensors.pop(CLASS_TABLE, None)
    return from_diffusers(tensors, places, shapes_of(model), str(file), str(config.get("_class_name")))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything in a model's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that begin with `prefix` and a dot."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def weights_file(folder: Path, ema: bool) -> Path:
    """The file of weights in a part's folder; of several variants the plain one."""
    return first_file(folder, *((_STEM,) if ema else (f"{_STEM}.non_ema", _STEM)))


def first_file(folder: Path, *stems: str) -> Path:
    """The first file of weights of one of these names, or the only variant (`fp16`) of the last one."""
    for name in (stem + ending for stem in stems for ending in _ENDINGS):
        if (folder / name).is_file():
            return folder / name
    stem = stems[-1]
    variants = sorted(file for file in folder.glob(f"{stem}.*") if file.suffix in (".safetensors", ".bin"))
    if len(variants) == 1:
        return variants[0]
    found = ", ".join(file.name for file in variants) or "no file of weights"
    raise CorruptCheckpoint(str(folder), f"has no {stem}.safetensors, but {found}")
