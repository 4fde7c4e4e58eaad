"""What the program supplies where a YAML leaves it open: the number of classes, the shift of the times.

The one who knows the values declares names by the dotted path of a part, `check` lets the YAML say `auto` or
nothing there, and `fill` puts the values in. In a path `*` stands for anything, dots too: `conditioner*` is
the conditioner and every part in it. A name concerns only the parts whose class takes it.
"""

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, ListConfig

from ldm.config import signatures
from ldm.config.annotations import mismatch
from ldm.config.tree import ConfigError, join, locate, path_of, places_of

AUTO = "auto"
Declared = Mapping[str, Collection[str]]  # path of a part, perhaps with `*` -> names of its parameters


def names_for(declared: Declared, path: str) -> set[str]:
    """The names that are declared for the part at `path`."""
    return {name for pattern, names in declared.items() if fnmatchcase(path, pattern) for name in names}


def left_open(
    config: DictConfig | Mapping,
    part: str,
    name: str,
    *,
    allow_foreign: bool | Collection[str] = False,
    instead_of_default: bool = False,
) -> list[str]:
    """The dotted paths at which `fill` would put a value in."""
    found = _open(config, part, name, allow_foreign, instead_of_default)
    return [_param(path, name) for path, _, _ in found]


def fill(
    config: DictConfig | dict,
    part: str,
    name: str,
    value: Any,
    *,
    allow_foreign: bool | Collection[str] = False,
    instead_of_default: bool = False,
) -> None:
    """Put `value` in for the parameter `name` of every part that `part` matches, in place.

    That is where the configuration says `auto`, and where it says nothing and the class has no default of its
    own. What is written stays.

    Args:
        config: a checked configuration, or a part of it; `part` is a path of the whole.
        instead_of_default: also where it says nothing and the class has a default.

    Raises:
        ConfigError: the value does not fit the signature, as `file:line: full.path: what`.
    """
    for path, node, accepted in list(_open(config, part, name, allow_foreign, instead_of_default)):
        if accepted is not None and (problem := mismatch(value, accepted[name].annotation)):
            raise ConfigError(f"{locate(places_of(config), _param(path, name))}: {problem}")
        if not node.get("params"):
            node["params"] = {}
        node["params"][name] = value


def _param(part: str, name: str) -> str:
    return join(join(part, "params"), name)


def _open(
    config: Any, part: str, name: str, allow_foreign: bool | Collection[str], instead_of_default: bool
) -> Iterator[tuple[str, Any, dict | None]]:
    """Path, mapping and parameters of the parts that leave `name` open."""
    for path, node in _parts(config, path_of(config)):
        if not fnmatchcase(path, part):
            continue
        try:
            function = signatures.resolve_target(node["target"], allow_foreign)
        except ValueError as error:
            raise ConfigError(f"{locate(places_of(config), join(path, 'target'))}: {error}") from error
        accepted, given = signatures.parameters(function), node.get("params") or {}
        takes = accepted is None or name in accepted
        absent = name in signatures.missing_parameters(function, given)
        if instead_of_default and accepted is not None:
            absent = takes and name not in given
        if absent or (takes and given.get(name) == AUTO):
            yield path, node, accepted


def _parts(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every mapping with a target, with its path."""
    if isinstance(node, dict | DictConfig):
        if "target" in node:
            yield path, node
        items = node.items()
    else:
        items = enumerate(node) if isinstance(node, list | ListConfig) else ()
    for key, value in items:
        yield from _parts(value, join(path, key))
