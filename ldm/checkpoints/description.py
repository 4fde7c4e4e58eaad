"""What a file says of its model: how it is built, and what it was trained on.

The JSON of a `Description` stands in every file of ours, whatever its format; old ones stay readable.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ldm.arguments import recorded
from ldm.config.annotations import mismatch
from ldm.config.signatures import field_types
from ldm.weights.errors import CheckpointError, UnsupportedCheckpoint

FORMAT = "ldm/1"
# Written only where they say something.
_OPTIONAL = ("image_size", "step", "notes")


class NotExpressible(ValueError):
    """A format has no place for something in a model; `reasons` lists everything that does not fit."""

    def __init__(self, what: str, reasons: Iterable[str]):
        self.reasons = list(reasons)
        super().__init__(f"{what}: " + "; ".join(self.reasons))


@dataclass(eq=False)
class Description(Mapping):
    """Plain data about a model, also readable as a mapping; equal to a mapping that says the same.

    Attributes:
        model: {target, params}: how to build the model, first stage included.
        classes: names of the classes, or None.
        image_size: side, or [height, width], in pixels.
        sampling: defaults for sampling (sampler, steps, guidance, ...).
        weights: "ema" or "raw".
        step: optimizer steps behind the weights.
        notes: what of a foreign config was not read.
    """

    model: dict[str, Any]
    classes: list[str] | None = None
    image_size: int | list[int] | None = None
    sampling: dict[str, Any] | None = None
    weights: str | None = None
    step: int | None = None
    notes: list[str] | None = None
    format: str = field(default=FORMAT, kw_only=True)

    @classmethod
    def read(cls, found: Any, where: str) -> "Description":
        """Plain data from the file `where`, held against what the rest of the toolkit relies on.

        Raises:
            CheckpointError: another format, or no description of a model.
        """
        if isinstance(found, cls):
            return found
        if not isinstance(found, Mapping):
            raise CheckpointError(where, f"describes its model by a {type(found).__name__}, not by a mapping")
        check_format(found.get("format"), where)
        kinds = {name: kind for name, kind in field_types(cls).items() if name != "format"}
        for name, kind in kinds.items():
            if wrong := mismatch(found.get(name), kind):
                raise CheckpointError(where, f"its description's {name!r}: {wrong}")
        return cls(**{name: found.get(name) for name in kinds})

    def plain(self) -> dict[str, Any]:
        """What is written to files."""
        return {n: value for n, value in vars(self).items() if value is not None or n not in _OPTIONAL}

    def check_weights(self, ema: bool, where: str, hint: str = "") -> None:
        """CheckpointError where raw weights are asked for and there are averaged ones only."""
        if not ema and self.weights == "ema":
            raise CheckpointError(where, f"holds averaged (EMA) weights only{hint}")

    def replaced(self, **changes: Any) -> "Description":
        """The same with other values."""
        return dataclasses.replace(self, **changes)

    def __getitem__(self, name: str) -> Any:
        return self.plain()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain())

    def __len__(self) -> int:
        return len(self.plain())


def check_format(given: Any, where: str) -> None:
    """Refuse what a newer version wrote, or somebody else."""
    if given != FORMAT:
        number = re.fullmatch(r"ldm/([0-9]+)", str(given))
        newer = number and int(number[1]) > int(FORMAT.removeprefix("ldm/"))
        who = " of a newer version of the toolkit (upgrade it)" if newer else ""
        raise UnsupportedCheckpoint(where, f"has format {given!r}{who}; this version reads {FORMAT}")


def described(model: nn.Module) -> Description:
    """The description of any model whose parts remember their arguments; what else is known of it is kept.

    Raises:
        NotExpressible: parts that do not say how they were made, each with its place.
    """
    reasons: list[str] = []
    tree = _node(model, type(model).__name__, reasons)
    if reasons:
        raise NotExpressible("a file that describes itself cannot hold this model", reasons)
    known = getattr(model, "description", None)
    if isinstance(known, Description):
        return known.replaced(model=tree)
    size = getattr(model, "image_size", None)
    return Description(tree, image_size=list(size) if isinstance(size, tuple) else size, weights="raw")


def _node(part: Any, place: str, reasons: list[str]) -> Any:
    """{target, params} of a part; what now stands under an argument's name is described in its place."""
    made = recorded(part)
    if made is None:
        kind = f"{type(part).__module__}.{type(part).__qualname__}".removeprefix("builtins.")
        reasons.append(f"{place} is a {kind}, which does not remember how it was made")
        return None
    target, arguments = made
    params = {}
    for name, value in arguments.items():
        current = getattr(part, name, None)
        value = current if recorded(value) and recorded(current) else value
        if _replaced(value, part):
            reasons.append(f"{place}.{name} was replaced under another name")
        params[name] = _value(value, f"{place}.{name}", reasons)
    return {"target": target, "params": params}


def _replaced(argument: Any, part: Any) -> bool:
    """Whether nothing of a module that a part was made with is in it any more."""
    if not isinstance(argument, nn.Module) or not isinstance(part, nn.Module):
        return False
    own, given = (set(map(id, module.parameters())) for module in (part, argument))
    return bool(given) and own.isdisjoint(given)


def _value(value: Any, place: str, reasons: list[str]) -> Any:
    """An argument as plain data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_value(item, f"{place}.{i}", reasons) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(name): _value(item, f"{place}.{name}", reasons) for name, item in value.items()}
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    return _node(value, place, reasons)


def node(target: str, **params: Any) -> dict[str, Any]:
    """The description of a part of this toolkit, `target` without its `ldm.`."""
    return {"target": f"ldm.{target}", "params": params}


def targets_of(tree: Any) -> Iterator[str]:
    """Every `target` in a tree of plain data."""
    return (target for target in values_of(tree, "target") if isinstance(target, str))


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Everything that stands under this key in a tree of plain data."""
    if isinstance(tree, Mapping):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    for item in tree if isinstance(tree, list | tuple) else ():
        yield from values_of(item, key)
