"""From a description to a model: built without memory for its weights, then filled from a file."""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from ldm import config as configuration
from ldm.checkpoints.description import Description, targets_of, values_of
from ldm.checkpoints.strict import load_strict
from ldm.weights.errors import CheckpointError, UnsupportedCheckpoint

#: Where the parts of a model are. A file of weights builds nothing else: no data set that searches the disk,
#: no loss that downloads.
_ROOMS = ("ldm.conditioning.", "ldm.diffusion.", "ldm.latent_diffusion.", "ldm.models.", "ldm.nn.")
# The largest published models have some 3000 parameters, and 1000 timesteps, 4000 at most.
_MOST_PARAMETERS = 50_000
_MOST_TIMESTEPS = 1_000_000


def build_filled(
    description: Description,
    tensors: Mapping[str, Tensor] | Callable[[nn.Module], Mapping[str, Tensor]],
    where: str,
    *,
    trusted: Collection[str] = (),
    ignore: Collection[str] = (),
) -> nn.Module:
    """The described model with these weights, strictly, in eval mode; the description is its attribute.

    Names and sizes are compared before any memory is taken: a tree may ask for more than there is.

    Args:
        tensors: the state dict, or what makes it for the empty model.
        where: the file, for messages.
        trusted: targets outside `ldm` that the user's own YAML has. A model with such classes, which may not
            survive the meta device, is built for real.

    Raises:
        CheckpointError, ConfigError: as `build_empty` and `load_strict`.
    """
    tree = description.model
    foreign = any(not target.startswith("ldm.") for target in targets_of(tree))
    model = build(tree, where, trusted) if foreign else build_empty(tree, where)
    found = tensors(model) if callable(tensors) else tensors
    load_strict(model, found, ignore=ignore, where=where, assign=not foreign)
    model.description = description
    return model


def build(tree: Mapping[str, Any], where: str, trusted: Collection[str] = ()) -> nn.Module:
    """The model of a tree with fresh weights, in eval mode.

    Only models and their parts inside `ldm` are built, and nothing else is imported but `trusted` targets.

    Raises:
        ConfigError: targets and params that this version does not have, or does not allow.
        CheckpointError: a target that is no part of a model, or no model.
    """
    part = _checked(tree, where, trusted)
    return _model(configuration.instantiate(part, allow_foreign=trusted), where)


def build_empty(tree: Mapping[str, Any], where: str) -> nn.Module:
    """The same on the meta device, with classes of `ldm` alone; `load_strict(assign=True)` fills it.

    Raises:
        ConfigError, CheckpointError: as `build`.
        UnsupportedCheckpoint: the parts do not fit together, or are absurdly large.
    """
    part = _checked(tree, where)
    try:
        with _limited():
            return _without_memory(lambda: _model(configuration.instantiate(part), where))
    except (configuration.ConfigError, CheckpointError):
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise UnsupportedCheckpoint(where, f"its parts do not fit together: {error}") from error


def _model(made: Any, where: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise CheckpointError(where, f"describes a {type(made).__name__}, which is no model")
    return made.eval()


def _checked(tree: Mapping[str, Any], where: str, trusted: Collection[str] = ()) -> Any:
    """The tree as a configuration: parts of models with fitting arguments, and no absurd sizes."""
    loaded = configuration.loads(json.dumps({"model": tree}), origin=where)
    if not isinstance(tree.get("target"), str):
        configuration.instantiate(loaded.model)  # says what a part is
    own = {target for target in targets_of(tree) if target.startswith("ldm.")} - set(trusted)
    if outside := sorted(target for target in own if not target.startswith(_ROOMS)):
        raise CheckpointError(where, f"asks for {', '.join(outside)}, which is no part of a model")
    steps = [n for n in values_of(tree, "timesteps") if isinstance(n, int | float) and n > _MOST_TIMESTEPS]
    if steps:
        raise UnsupportedCheckpoint(where, f"asks for {steps[0]:.4g} timesteps, which is absurd")
    configuration.check(loaded, allow_foreign=trusted)
    return loaded.model


def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds, on the meta device; buffers that no file holds are computed."""
    with torch.device("meta"):
        made = make()
    saved = made.state_dict(keep_vars=True)
    computed = [name for name, buffer in made.named_buffers() if buffer.is_meta and name not in saved]
    if computed:
        with _at_each_parameter(_to_meta):
            real = dict(make().named_buffers())
        for name in computed:
            path, _, leaf = name.rpartition(".")
            made.get_submodule(path)._buffers[leaf] = real[name]
    return made


def _limited() -> contextlib.AbstractContextManager:
    """Stop a description that asks for an absurd number of layers before they fill the memory."""
    numbers = itertools.count(1)

    def count(parameter: nn.Parameter | None) -> None:
        if next(numbers) > _MOST_PARAMETERS:
            raise ValueError(f"more than {_MOST_PARAMETERS} parameters, which is absurd")

    return _at_each_parameter(count)


def _to_meta(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """A parameter without its memory; buffers keep theirs."""
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


@contextlib.contextmanager
def _at_each_parameter(act: Callable) -> Iterator[None]:
    """`act` hears of every parameter that this thread registers, and may give another in its place."""
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return act(parameter) if threading.get_ident() == thread else None

    handle = registration.register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
