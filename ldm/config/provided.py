"""What the program supplies where a YAML leaves it open: the number of classes, the shift of the times.

The one who knows the values declares names by the dotted path of a part, `check` lets the YAML say `auto` or
nothing there, and `fill` puts the values in. In a path `*` stands for anything, dots too: `conditioner*` is
the conditioner and every part in it. A name concerns only the parts whose class takes it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
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


def fill(
    config: DictConfig | dict,
    part: str,
    name: str,
    make: Callable[[], Any],
    *,
    allow_foreign: bool | Collection[str] = False,
) -> None:
    """Put `make()` in for the parameter `name` of every part that `part` matches, in place.

    That is where the configuration says `auto`, and where it says nothing and the class has no default of its
    own; what is written stays. `make` is not called where nothing is open.

    Args:
        config: a checked configuration, or a part of it; `part` is a path of the whole.

    Raises:
        ConfigError: a ValueError of `make`, or a value that does not fit the signature, as
            `file:line: full.path: what`.
    """
    for path, node, accepted in list(_open(config, part, name, allow_foreign)):
        try:
            value = make()
            problem = None if accepted is None else mismatch(value, accepted[name].annotation)
        except ValueError as error:
            problem = f"{AUTO}: {error}"
        if problem:
            where = locate(places_of(config), join(join(path, "params"), name))
            raise ConfigError(f"{where}: {problem}")
        if not node.get("params"):
            node["params"] = {}
        node["params"][name] = value


def _open(
    config: Any, part: str, name: str, allow_foreign: bool | Collection[str]
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
