"""The toolkit's own files: `model.safetensors` that describes itself, and checkpoints of a training run."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.checkpoints import building
from ldm.checkpoints.description import FORMAT as FORMAT
from ldm.checkpoints.description import Description, check_format
from ldm.files import whole_file
from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.reading import INDEX, read_pickled, read_weights
from ldm.weights.writing import write_safetensors

METADATA_KEY = "ldm"
MODEL_FILE = "model.safetensors"
_TRAINING_KEYS = ("description", "ema", "model", "step")


def build(description: Mapping, where: str, trusted: Collection[str] = ()) -> nn.Module:
    """The model of a description, which it keeps, with fresh weights, in eval mode; see `building.build`."""
    known = Description.read(description, where)
    model = building.build(known.model, where, trusted)
    model.description = known
    return model


def save_model(path: Path, tensors: Mapping[str, Tensor], description: Mapping) -> None:
    """Write a file that `load` can read alone; beside its target first, synced, then renamed."""
    plain = description.plain() if isinstance(description, Description) else description
    write_safetensors(path, dict(tensors), {METADATA_KEY: json.dumps(plain, sort_keys=True)})


def read_description(path: Path) -> dict | None:
    """The description inside a .safetensors file, or None if the file is not one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        read_weights(path)  # says more about what is wrong
        raise CorruptCheckpoint(str(path), f"cannot be read as safetensors: {error}") from error
    if METADATA_KEY not in metadata:
        return None
    try:
        return json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(str(path), f"its description is no JSON: {error}") from error


def load_model(path: Path, ema: bool = True, trusted: Collection[str] = ()) -> nn.Module:
    """The model in a `model.safetensors` of ours, strictly."""
    found = read_description(path)
    if found is None:
        raise CheckpointError(str(path), "holds weights, but no description of their model")
    description = Description.read(found, str(path))
    raw = newest_training(path.parent) or "the run's checkpoints/"
    description.check_weights(ema, str(path), f"; the raw ones are in {raw}")
    return building.build_filled(description, read_weights(path).tensors, str(path), trusted=trusted)


def save_training(path: Path, state: Mapping) -> None:
    """Write a training checkpoint (plain containers and tensors only); a previous one is never harmed."""
    with whole_file(path, durable=True) as file:
        torch.save(dict(state), file)


def read_training(path: Path) -> dict:
    """A training checkpoint of ours, on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: it is damaged (CorruptCheckpoint), asks for code to be run (UnsafeCheckpoint), or is
            whole, but of another kind.
    """
    try:
        state = read_pickled(path)
    except (CorruptCheckpoint, UnsupportedCheckpoint) as error:
        what = f"cannot be read as a training checkpoint: {error.reason}"
        raise CorruptCheckpoint(str(path), what) from error
    if not isinstance(state, dict) or not str(state.get("format")).startswith("ldm/"):
        raise CheckpointError(str(path), "is no training checkpoint of this toolkit")
    check_format(state["format"], str(path))
    if missing := [key for key in _TRAINING_KEYS if key not in state]:
        raise CheckpointError(str(path), f"is a training checkpoint without {', '.join(missing)}")
    Description.read(state["description"], str(path))
    for key in ("model", "ema"):
        weights = state[key]
        if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
            raise CheckpointError(str(path), f"is a training checkpoint whose {key!r} is no state dict")
    return state


def load_training(path: Path, ema: bool = True, trusted: Collection[str] = ()) -> nn.Module:
    """The model in a training checkpoint, with its EMA weights where it has them and `ema` asks for them."""
    state = read_training(path)
    averaged = state["ema"] if ema else {}
    known = Description.read(state["description"], str(path))
    description = known.replaced(weights="ema" if averaged else "raw", step=state["step"])
    return building.build_filled(description, state["model"] | averaged, str(path), trusted=trusted)


def newest_training(run: Path) -> Path | None:
    """The latest checkpoint in a run folder."""
    files = sorted((run / "checkpoints").glob("step-*.ckpt"))
    return files[-1] if files else None


def is_run_folder(path: Path) -> bool:
    return path.is_dir() and ((path / MODEL_FILE).exists() or (path / "checkpoints").is_dir())


def describes_itself(path: Path) -> bool:
    """Whether a file or a run folder holds a description of its model, so that no other is needed."""
    if path.is_dir():
        return (path / MODEL_FILE).exists() or newest_training(path) is not None
    if path.suffix == ".safetensors":
        return read_description(path) is not None
    if path.name.endswith(INDEX):
        return False
    try:
        return bool(read_training(path))
    except CorruptCheckpoint:
        raise
    except CheckpointError:
        return False


def load_run(run: Path, ema: bool = True, trusted: Collection[str] = ()) -> nn.Module:
    """The model of a run folder: its `model.safetensors`, or for raw weights its newest checkpoint."""
    exported, checkpoint = run / MODEL_FILE, newest_training(run)
    if exported.exists() and (ema or checkpoint is None):
        return load_model(exported, ema, trusted)
    if checkpoint is None:
        raise CheckpointError(str(run), "has no weights yet: train it first")
    return load_training(checkpoint, ema, trusted)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values: changes when any weight does."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
