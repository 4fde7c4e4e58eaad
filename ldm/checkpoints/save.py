"""`ldm.save`: any model of ours as a file that describes itself."""

from pathlib import Path

import torch
from torch import nn

from ldm.checkpoints import native
from ldm.checkpoints.building import build, build_empty
from ldm.checkpoints.description import Description, NotExpressible, described, targets_of
from ldm.config import ConfigError
from ldm.weights.errors import CheckpointError


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a `model.safetensors` that `ldm.load` opens, and return its path.

    The model may come from Python as well as from a file, and have parts of your own classes if these came
    from `ldm.config.instantiate`, or are decorated with `ldm.arguments.remembers_arguments`; to load such a
    model takes the config that names them.

    Args:
        path: ends in `.safetensors`, or is a folder, which gets `model.safetensors`.

    Raises:
        NotExpressible: (a ValueError) parts that do not say how they were made, or parameters that were
            changed since.
        ValueError: another ending.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / native.MODEL_FILE
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a model is saved as .safetensors, or in a folder")
    description, tensors = described(model), model.state_dict()
    _check_shapes(description, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    native.save_model(path, tensors, description)
    return path


def _check_shapes(description: Description, model: nn.Module) -> None:
    """The description must give this model: layers may have been added since it was made."""
    where = type(model).__name__
    own = [target for target in targets_of(description.model) if not target.startswith("ldm.")]
    try:
        with torch.random.fork_rng(devices=[]):
            again = build(description.model, where, own) if own else build_empty(description.model, where)
    except (ConfigError, CheckpointError) as error:
        raise NotExpressible(f"this {where} is not built by what it was made with", [str(error)]) from error
    shapes, expected = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, again))
    changed = sorted(n for n in {*shapes, *expected} if shapes.get(n) != expected.get(n))
    if changed:
        raise NotExpressible(f"this {where} was changed after it was made", changed)
