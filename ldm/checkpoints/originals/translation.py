"""From a part of an original's YAML to a part of this toolkit: what the projects share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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


def lookup(part: Part, table: Mapping[str, Callable], what: str) -> Callable | None:
    """The translator of a part's target; an unknown target is a problem that names the nearest."""
    if part.target not in table:
        near = did_you_mean(part.target, table)
        known = ", ".join(dict.fromkeys(target.rpartition(".")[2] for target in table))
        part.reading.problem(
            ".".join(filter(None, (part.path, "target"))),
            f"{part.target!r} is no known {what}{near} (known: {known})",
        )
        part.reading.check()
    return table[part.target]


_ABSENT = object()


def take_given(part: Part, names: Mapping[str, str]) -> dict[str, Any]:
    """{ours: value} of the parameters {theirs: ours} that are given."""
    found = {}
    for theirs, ours in names.items():
        value = part.take(theirs, _ABSENT)
        if value is not _ABSENT:
            found[ours] = value
    return found


def same_names(function: Callable, without: tuple[str, ...] = ()) -> dict[str, str]:
    """{name: name} of a callable's parameters, for `take_given`."""
    return {name: name for name in signatures.parameters(function) or () if name not in without}


def factor_of(ddconfig: Mapping) -> int:
    """Downsampling factor of an autoencoder."""
    return 2 ** (len(ddconfig["ch_mult"]) - 1)


def set_latent_scale(model: nn.Module, scale: torch.Tensor) -> None:
    """Write a scale, 0-d, over that of a `LatentDiffusion`."""
    with torch.no_grad():
        model.latent_scale.copy_(scale.to(model.latent_scale).expand_as(model.latent_scale))
