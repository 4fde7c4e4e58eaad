"""A configuration as a tree: paths, the file and line of each key, plain data, writing, comparing.

Paths are dotted, list items by index (`data.params.sizes.0`).
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.files import whole_file

Places = dict[str, str]  # dotted path -> "file:line" or "command line"
# Kept beside a DictConfig's content; a copied configuration only loses its line numbers.
_PLACES = "_ldm_places"
#: The place of a value that `load` was told to assume.
ASSUMED = "assumed"


class ConfigError(ValueError):
    """Mistakes in a configuration, one a line; `problems` holds them singly."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def reason_of(error: Exception) -> str:
    """What a YAML or OmegaConf error says, in one line."""
    return getattr(error, "problem", None) or str(error).strip().split("\n")[0]


# Paths and places


def join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def parts_of(path: str) -> list[str]:
    """`a[0].b` and `a.0.b` alike -> ["a", "0", "b"]."""
    return re.findall(r"[^.\[\]\s]+", path)


def _items(node: Any) -> list[tuple[Any, Any]]:
    """What a mapping or a list holds, by key or index; nothing for a plain value."""
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | ListConfig) else []


def entries(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A tree and everything in it, containers too, with their dotted paths."""
    yield path, node
    for name, value in _items(node):
        yield from entries(value, join(path, name))


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted path; an empty container and a list of plain values count as one value."""
    items = _items(node)
    if not items or (isinstance(node, list) and not any(isinstance(item, Mapping | list) for item in node)):
        yield path, node
    else:
        for name, value in items:
            yield from leaves(value, join(path, name))


def keep_places(config: DictConfig, places: Places) -> None:
    config.__dict__[_PLACES] = places


def places_of(config: Any) -> Places:
    """Where each key of the whole configuration that `config` belongs to was written."""
    return config._get_root().__dict__.get(_PLACES, {}) if OmegaConf.is_config(config) else {}


def path_of(config: Any) -> str:
    """The dotted path of a part of a configuration, or that an OmegaConf error names; empty for the whole."""
    is_part = OmegaConf.is_config(config)
    full = config._get_full_key(None) if is_part else getattr(config, "full_key", None)
    return ".".join(parts_of(full or ""))


def locate(places: Places, path: str) -> str:
    """`file:line: path`, with the line of the closest key above where the path itself is written nowhere."""
    parts = path.split(".")
    near = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    place = next((places[p] for p in near if p in places), places.get("", ""))
    return ": ".join(filter(None, (place, path or "the configuration")))


# Plain data


def to_plain(config: Any) -> Any:
    """A configuration as plain dicts and lists of its own, interpolations resolved."""
    if isinstance(config, DictConfig | ListConfig):
        try:
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            where = locate(places_of(config), path_of(error))
            raise ConfigError(f"{where}: {reason_of(error)}") from error
    if isinstance(config, Mapping):
        return {name: to_plain(value) for name, value in config.items()}
    return [to_plain(item) for item in config] if isinstance(config, list | tuple) else config


def to_yaml(config: DictConfig | Mapping) -> str:
    """YAML text with every interpolation resolved, keys in their order."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def save(config: DictConfig | Mapping, path: str | os.PathLike) -> None:
    """Write YAML so that `path` holds either the old or the whole new text, whatever happens in between."""
    text = to_yaml(config)
    with whole_file(path, durable=True) as file:
        file.write(text.encode())


def differences(before: DictConfig | Mapping, after: DictConfig | Mapping) -> list[str]:
    """What changed between two configurations, as `path: old -> new`; empty when they say the same."""
    old, new = dict(leaves(to_plain(before))), dict(leaves(to_plain(after)))
    both = old.keys() & new.keys()
    changed = [p for p in dict.fromkeys([*old, *new]) if p not in both or not _same(old[p], new[p])]

    def shown(side: dict, path: str) -> str:
        return repr(side[path]) if path in side else "(absent)"

    return [f"{path}: {shown(old, path)} -> {shown(new, path)}" for path in changed]


def _same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b) or (a == b and bool not in (type(a), type(b)))
