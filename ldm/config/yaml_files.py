"""YAML files as trees of plain data, merged over their bases, with the line of every key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.tree import ConfigError, Places, join, locate, path_of, reason_of
from ldm.wording import did_you_mean, some

_MOST_KEYS = 100_000


def read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict, Places]:
    """The tree of a YAML file, merged over its base's; interpolations stay as they are written.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, bases that go in a circle.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path}: base files refer to each other in a circle")
    tree, places = parse(_text(path), str(path))
    if "base" not in tree:
        return tree, places
    base = tree.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{locate(places, 'base')}: expected one file name, got {base!r}")
    under, under_places = read(path.parent / base, (*above, path.resolve()))
    return _merge(under, tree), under_places | places


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: cannot be read as a YAML file ({error})") from error
        folder = path if path.is_dir() else path.parent
        files = sorted(str(p.relative_to(folder)) for p in [*folder.glob("*.y*ml"), *folder.glob("*/*.y*ml")])
        has = f"; {folder} has {some(files, 12)}" if files else ""
        what = "is a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}{did_you_mean(path.name, files) or has}") from None


def parse(text: str, origin: str) -> tuple[dict, Places]:
    """The tree of a YAML text; `origin` stands for the file in messages."""
    places: Places = {"": origin}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{origin}: expected a mapping of sections")
        problems = list(_scan(node, "", places, ()))
        if problems:
            raise ConfigError(*problems)
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False), places
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{line}: not YAML: {reason_of(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{locate(places, path_of(error))}: {reason_of(error)}") from error


def _scan(node: yaml.Node, path: str, places: Places, above: tuple[yaml.Node, ...]) -> Iterator[str]:
    """Note the line of every key in `places`, and yield the keys that are given twice."""
    origin = places[""]
    if len(places) > _MOST_KEYS:
        raise ConfigError(f"{origin}: more than {_MOST_KEYS} keys; do its anchors multiply?")
    if any(node is parent for parent in above):
        yield f"{origin}:{node.start_mark.line + 1}: {path}: an anchor contains itself"
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places[join(path, i)] = f"{origin}:{item.start_mark.line + 1}"
            yield from _scan(item, join(path, i), places, (*above, node))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, full = key.start_mark.line + 1, join(path, key.value)
            if full in lines and key.value != "<<":
                yield f"{origin}:{line}: {full}: given twice (first on line {lines[full]})"
            lines.setdefault(full, line)
            places[full] = f"{origin}:{line}"
            yield from _scan(value, full, places, (*above, node))


def _merge(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    if "target" in over and over["target"] != under.get("target"):
        return over
    return under | {name: _merge(under.get(name), value) for name, value in over.items()}
