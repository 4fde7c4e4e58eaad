"""Reading folders of diffusers: a pipeline, one of its parts, or what `ldm convert --to diffusers` wrote.

Every key of every file is accounted for; diffusers itself only warns where weights are missing.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.building import build_filled
from ldm.checkpoints.description import Description
from ldm.checkpoints.diffusers import export
from ldm.checkpoints.diffusers.export import CONDITIONER, INDEX, NOTE, NOTE_FORMAT, TABLE_LAYERS, TABLE_PREFIX
from ldm.checkpoints.diffusers.model_config import CONFIG, read_config
from ldm.checkpoints.diffusers.part import CLASS_TABLE, part_tensors, part_tree, prefixed, weights_file
from ldm.checkpoints.diffusers.pipeline import load_pipeline
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.errors import CheckpointError, CorruptCheckpoint
from ldm.weights.reading import read_weights

_TOLERANCE = 1e-4  # of its largest entry: it was computed elsewhere


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder is for this reader: it has a model_index.json, our note, or one part's config."""
    return path.is_dir() and any((path / name).is_file() for name in (INDEX, NOTE, CONFIG))


def load_diffusers(folder: str | Path, ema: bool = True) -> nn.Module:
    """The model in a folder of diffusers, in eval mode, with a native `description`.

    A pipeline gives a `LatentDiffusion` of its UNet, its first stage, the denoiser that its scheduler implies
    and Stable Diffusion 1's text encoder. Other text encoders are not read, which is logged; conditions are
    then the caller's: `cond={"crossattn": ...}`. One part's folder gives the first stage or the UNet alone.

    Args:
        folder: with `model_index.json`, `config.json` or `ldm.json`.
        ema: False takes the weights before averaging, where the folder has them (`*.non_ema.*`).

    Raises:
        UnsupportedCheckpoint: a class or an option that is not built here.
        KeyMismatch: keys are missing, extra or of another shape.
        CheckpointError: a part is absent, damaged, or contradicts our note.
    """
    folder = Path(folder)
    if (folder / NOTE).is_file():
        return _load_noted(folder, ema)
    if (folder / INDEX).is_file():
        return load_pipeline(folder, ema)
    where = str(folder / CONFIG)
    known = Description(part_tree(read_config(folder / CONFIG), where))
    return build_filled(known, lambda model: part_tensors(folder, model, ema), str(folder))


def _load_noted(folder: Path, ema: bool) -> nn.Module:
    where = str(folder / NOTE)
    note = read_config(folder / NOTE)
    if note.get("format") != NOTE_FORMAT:
        raise CheckpointError(where, f"has format {note.get('format')!r}; this version reads {NOTE_FORMAT!r}")
    description = Description.read(note.get("description"), where)
    description.check_weights(ema, str(folder))

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        if isinstance(model, LatentDiffusion):
            return _noted_tensors(folder, model, note, ema)
        return part_tensors(folder, model, ema)

    model = build_filled(description, tensors, where)
    _check_configs(folder, model)
    if isinstance(model, LatentDiffusion):
        _check_table(folder, model, ema)
    return model


def _noted_tensors(folder: Path, model: LatentDiffusion, note: Mapping, ema: bool) -> dict[str, Tensor]:
    """Every parameter and buffer of a model from the files that `save_diffusers` wrote."""
    tensors: dict[str, Tensor] = {}
    for name in ("latent_shift", "latent_scale"):
        try:
            tensors[name] = torch.tensor(note[name], dtype=torch.float32).reshape(getattr(model, name).shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            what = f"its {name} is no list of numbers: {error}"
            raise CorruptCheckpoint(str(folder / NOTE), what) from error
    replaced = None if export.class_table(model) is None else TABLE_LAYERS
    for name, (prefix, module) in export.parts_of(model).items():
        without = replaced if module is model.network else None
        tensors |= prefixed(prefix, part_tensors(folder / name, module, ema, without))
    conditioner = read_weights(folder / CONDITIONER).tensors if (folder / CONDITIONER).is_file() else {}
    for name, tensor in conditioner.items():
        moved = name.removeprefix(TABLE_PREFIX)
        tensors[f"conditioner.{name}" if moved == name else f"model.diffusion_model.{moved}"] = tensor
    return tensors


def _check_table(folder: Path, model: LatentDiffusion, ema: bool) -> None:
    """The network's table of classes against the layers that it stands for, which are what is loaded."""
    expected = export.class_table(model)
    if expected is None:
        return
    where = weights_file(folder / "unet", ema)
    table = read_weights(where).tensors.get(CLASS_TABLE)
    if table is None or table.shape != expected.shape:
        raise CheckpointError(str(where), f"{CLASS_TABLE} is missing or no table of {tuple(expected.shape)}")
    tolerance = max(_TOLERANCE, 4 * torch.finfo(table.dtype).eps)  # it may be in half precision
    if (table.float() - expected.float()).abs().max() > tolerance * expected.float().abs().max():
        raise CheckpointError(str(where), f"{CLASS_TABLE} was changed: {CONDITIONER} says something else")


def _check_configs(folder: Path, model: nn.Module) -> None:
    """No config may say anything else than the note; keys that diffusers added are no contradiction."""
    for name, wanted in json.loads(json.dumps(export.folder_configs(model))).items():
        found = wanted if name in (NOTE, INDEX) else read_config(folder / name)
        changed = [
            f"{key}={found.get(key)!r} (was {value!r})"
            for key, value in wanted.items()
            if not key.startswith("_diffusers") and found.get(key) != value
        ]
        if changed:
            what = f"was changed after the export, unlike {NOTE}: {', '.join(changed)}"
            raise CheckpointError(str(folder / name), what)
