"""From a part of an original's YAML to a part of this toolkit: what the projects share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldm.checkpoints.originals.original_yaml import Part
from ldm.config import signatures
from ldm.wording import did_you_mean

View = Callable[[nn.Module], nn.Module]


def same(module: nn.Module) -> nn.Module:
    """The view of a module whose names are the original's already."""
    return module


@dataclass(frozen=True)
class Translated:
    """A part in this toolkit's terms.

    Attributes:
        node: `{target, params}` as `ldm.config` builds it.
        view: module -> the same parameters under the names that the original's files have. The view shares
            them: what is loaded into it is in the module.
        averaged: beginning of the view's names of which files hold averaged copies ("" is all, None none).
        latent_scale: whether the latents' scale stands in the file (`scale_by_std`), as `scale_factor`.
    """

    node: dict[str, Any]
    view: View = same
    averaged: str | None = None
    latent_scale: float | None = None
    scale_in_file: bool = False


class Shell(nn.Module):
    """Modules and parameters of others under other names; it computes nothing."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def lookup(part: Part, table: Mapping[str, Callable], what: str) -> Callable:
    """The translator of a part's target; an unknown target is a problem that names the nearest."""
    if part.target not in table:
        near = did_you_mean(part.target, table)
        known = ", ".join(dict.fromkeys(target.rpartition(".")[2] for target in table))
        part.problem_beside("target", f"{part.target!r} is no known {what}{near} (known: {known})")
        part.reading.check()
    return table[part.target]


def translated(part: Part, name: str, table: Mapping[str, Callable], what: str, *more: Any) -> Any:
    """What a table's translator makes of a parameter that is itself a part."""
    inner = part.part(name)
    return lookup(inner, table, what)(inner, *more)


_ABSENT = object()


def take_given(part: Part, *names: str, **renamed: str) -> dict[str, Any]:
    """The parameters that are given, of `names` and of `renamed` (theirs=ours), by our names."""
    theirs = {name: name for name in names} | renamed
    found = {ours: part.take(name, _ABSENT) for name, ours in theirs.items()}
    return {ours: value for ours, value in found.items() if value is not _ABSENT}


def arguments_for(function: Callable, without: tuple[str, ...] = ()) -> list[str]:
    """Names of a callable's parameters, for `take_given`."""
    return [name for name in signatures.parameters(function) or () if name not in without]
