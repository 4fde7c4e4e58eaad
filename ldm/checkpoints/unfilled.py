"""Models built from a description without memory for their weights, to be filled from a file."""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

from ldm import config as configuration
from ldm.checkpoints.trust import targets_of
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.errors import CheckpointError, UnsupportedCheckpoint

WHOLE = "ldm.latent_diffusion.LatentDiffusion"
#: Parts of a LatentDiffusion that are all parameters; schedule and scale are computed, and need memory.
_EMPTY = ("first_stage", "network", "conditioner")
#: Where the parts of a model are. A file of weights builds nothing else: no data set that searches the disk,
#: no loss that downloads.
_ROOMS = ("ldm.conditioning", "ldm.diffusion", "ldm.latent_diffusion", "ldm.models", "ldm.nn")
# The largest published models have some 3000 parameters, and 1000 timesteps, 4000 at most.
_MOST_PARAMETERS = 50_000
_MOST_TIMESTEPS = 1_000_000


def check_rooms(tree: Mapping[str, Any], where: str, trusted: Collection[str] = ()) -> None:
    """Refuse a description that names what is in this package, but no part of a model, or absurd sizes.

    Raises:
        CheckpointError: such a target, or more timesteps than any schedule has.
    """
    named = {target for target in targets_of(tree) if target not in trusted}
    outside = sorted(
        target
        for target in named
        if target.startswith("ldm.") and not any(target.startswith(f"{room}.") for room in _ROOMS)
    )
    if outside:
        raise CheckpointError(
            where, f"asks for {', '.join(outside)}, which is no part of a model; nothing was built"
        )
    steps = [n for n in _values_of(tree, "timesteps") if isinstance(n, int | float) and n > _MOST_TIMESTEPS]
    if steps:
        raise UnsupportedCheckpoint(where, f"asks for {steps[0]:.4g} timesteps, which is absurd")


def build_unfilled(tree: Mapping[str, Any], where: str) -> nn.Module:
    """The model of a `{target, params}` tree on the meta device, in eval mode.

    `load_strict(assign=True)` fills it. Only models and their parts inside `ldm` are built: a file must not
    be able to name anything else.

    Raises:
        ConfigError: a target or parameter that does not exist.
        CheckpointError: a target that is no part of a model, or no model.
        UnsupportedCheckpoint: the parts do not fit together, or are absurdly large.
    """
    loaded = configuration.loads(json.dumps({"model": tree}), origin=where)
    check_rooms(tree, where)
    configuration.check(loaded, allow_foreign=False)
    try:
        with _limited():
            if tree.get("target") != WHOLE:
                made = _without_memory(lambda: configuration.instantiate(loaded.model))
                if not isinstance(made, nn.Module):
                    raise CheckpointError(where, f"describes a {type(made).__name__}, which is no model")
                return made.eval()
            parts = {}
            for name, value in configuration.to_plain(loaded.model).get("params", {}).items():

                def make(name: str = name) -> Any:
                    return configuration.instantiate(loaded.model.params[name])

                is_part = isinstance(value, dict) and "target" in value
                parts[name] = value if not is_part else _without_memory(make) if name in _EMPTY else make()
            return LatentDiffusion(**parts).eval()
    except (configuration.ConfigError, CheckpointError):
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise UnsupportedCheckpoint(where, f"its parts do not fit together: {error}") from error


def _without_memory(make: Callable[[], Any]) -> Any:
    """What `make` builds, on the meta device; buffers that no file holds are computed."""
    with torch.device("meta"):
        made = make()
    if not isinstance(made, nn.Module):
        return made
    saved = made.state_dict(keep_vars=True)
    computed = [name for name, buffer in made.named_buffers() if buffer.is_meta and name not in saved]
    if computed:
        with _parameters_on_meta():
            real = dict(make().named_buffers())
        for name in computed:
            path, _, leaf = name.rpartition(".")
            made.get_submodule(path)._buffers[leaf] = real[name]
    return made


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Stop a description that asks for an absurd number of layers before they fill the memory."""
    made, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += threading.get_ident() == thread  # the hook hears of every thread's modules
        if made > _MOST_PARAMETERS:
            raise ValueError(f"more than {_MOST_PARAMETERS} parameters, which is absurd")

    handle = registration.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as soon as a module has them; buffers keep theirs."""

    thread = threading.get_ident()

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = registration.register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _values_of(node: Any, key: str) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if key in node:
            yield node[key]
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _values_of(item, key)
