"""What the program supplies where a YAML leaves it open: the number of classes, the shift of the times.

The one who knows the values declares names by the dotted path of a part, `check` lets the YAML say `auto` or
nothing there, and `fill` puts the values in. In a path `*` stands for anything, dots too: `conditioner*` is
the conditioner and every part in it. A name concerns only the parts whose class takes it.
"""

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig

from ldm.config import signatures
from ldm.config.annotations import mismatch
from ldm.config.signatures import Trust, is_target
from ldm.config.tree import ConfigError, entries, join, locate, path_of, places_of

AUTO = "auto"
Declared = Mapping[str, Collection[str]]  # path of a part, perhaps with `*` -> names of its parameters


def names_for(declared: Declared, path: str) -> set[str]:
    """The names that are declared for the part at `path`."""
    return {name for pattern, names in declared.items() if fnmatchcase(path, pattern) for name in names}


def fill(
    config: DictConfig | dict, part: str, name: str, make: Callable[[], Any], *, allow_foreign: Trust = False
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
    places = places_of(config)
    for path, node in list(entries(config, path_of(config))):
        if not is_target(node) or not fnmatchcase(path, part):
            continue
        try:
            function = signatures.resolve_target(node["target"], allow_foreign)
        except ValueError as error:
            raise ConfigError(f"{locate(places, join(path, 'target'))}: {error}") from error
        accepted, given = signatures.parameters(function), node.get("params") or {}
        is_auto = given.get(name) == AUTO and (accepted is None or name in accepted)
        if not is_auto and name not in signatures.missing_parameters(function, given):
            continue
        try:
            value = make()
            problem = None if accepted is None else mismatch(value, accepted[name].annotation)
        except ValueError as error:
            problem = f"{AUTO}: {error}"
        if problem:
            raise ConfigError(f"{locate(places, join(path, f'params.{name}'))}: {problem}")
        if not given:
            node["params"] = {}
        node["params"][name] = value
