"""YAML files: read with line numbers, base files and overrides; write; compare.

Paths inside a configuration are dotted, list items by index (`data.params.sizes.0`). Where each key came from
is kept beside the loaded DictConfig, so that `ldm.config` can name file and line.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.signatures import field_types, is_target, nested_dataclass
from ldm.files import whole_file
from ldm.wording import did_you_mean, nearest

Places = dict[str, str]  # dotted path -> "file:line" or "command line"
# Kept beside a DictConfig's content; a copied configuration only loses its line numbers.
_PLACES = "_ldm_places"
_MOST_KEYS = 100_000
_LISTED = 12  # names of files in a message
_OVERRIDE_FORM = "write it as a.b.c=value, for example training.steps=1000"
#: The place of a value that `load` was told to assume.
ASSUMED = "assumed"


class ConfigError(ValueError):
    """Mistakes in a configuration, one a line; `problems` holds them singly."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# Paths and places


def join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def parts_of(path: str) -> list[str]:
    """`a[0].b` and `a.0.b` alike -> ["a", "0", "b"]."""
    return re.findall(r"[^.\[\]\s]+", path)


def places_of(config: Any) -> Places:
    """Where each key of the whole configuration that `config` belongs to was written."""
    return config._get_root().__dict__.get(_PLACES, {}) if OmegaConf.is_config(config) else {}


def path_of(config: Any) -> str:
    """The dotted path of a part of a configuration; empty for the whole."""
    full = config._get_full_key(None) if OmegaConf.is_config(config) else ""
    return ".".join(parts_of(full or ""))


def locate(places: Places, path: str) -> str:
    """`file:line: path`, with the line of the closest key above where the path itself is written nowhere."""
    parts = path.split(".")
    near = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    place = next((places[p] for p in near if p in places), places.get("", ""))
    return ": ".join(filter(None, (place, path or "the configuration")))


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted path; an empty container and a list of plain values count as one value."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if not items or (isinstance(node, list) and not any(isinstance(item, Mapping | list) for item in node)):
        yield path, node
        return
    for name, value in items:
        yield from leaves(value, join(path, name))


# Reading


def load(
    path: str | os.PathLike,
    overrides: Sequence[str] = (),
    sections: Mapping[str, type] | None = None,
    assumed: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Read a YAML file, merge `overrides` in, and resolve every interpolation.

    A root key `base: other.yaml` (relative to the file) is read first and lies underneath: mappings are
    merged, lists and values replaced, and a mapping that names another `target` replaces the base's whole.

    Args:
        path: the YAML file.
        overrides: `a.b.c=value`, the value written as in YAML; list items by index (`a.0.b` or `a[0].b`).
            Where a mapping stands, `a.b=other.yaml` takes the same part of another configuration, whole.
        sections: dataclasses of plain sections by their dotted path ("" is the whole); a field that the YAML
            leaves out may then be overridden too. Keys directly below a target's params may always be given:
            `check` holds those against the signature, so that loading imports no model code.
        assumed: by dotted path, values in the place of what is open (`???`) or refers to something that is
            not there, for those who look at a configuration without running it. `places_of` then says
            `ASSUMED`.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, an override that fits nothing, an open `???`.
    """
    tree, places = _read(Path(path), ())
    problems = []
    for override in overrides:
        try:
            _override(tree, places, override, sections or {})
        except ValueError as error:
            problems.append(f"override '{override}': {error}")
    if problems:
        raise ConfigError(*problems)
    _assume(tree, places, assumed or {})
    return _resolved(tree, places)


def loads(text: str, origin: str = "<text>") -> DictConfig:
    """A complete configuration from YAML text, for example out of a checkpoint's metadata.

    Raises:
        ConfigError: as `load`; also where the text refers to something outside itself by an interpolation
            (which could read the environment) or a `base`.
    """
    tree, places = _parse(text, origin)
    loose = [path for path, value in leaves(tree) if "${" in str(value)] + ["base"] * ("base" in tree)
    if loose:
        raise ConfigError(*(f"{locate(places, p)}: refers to something outside the text" for p in loose))
    return _resolved(tree, places)


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict, Places]:
    if path.resolve() in above:
        raise ConfigError(f"{path}: base files refer to each other in a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        listing = f"; {path.parent} has {', '.join(beside)}" if beside else ""
        raise ConfigError(f"{path}: no such file{did_you_mean(path.name, beside) or listing}") from None
    except IsADirectoryError:
        inside = sorted(str(p.relative_to(path)) for p in [*path.glob("*.y*ml"), *path.glob("*/*.y*ml")])
        listing = f"one of its files: {', '.join(inside[:_LISTED])}" if inside else "a YAML file"
        raise ConfigError(f"{path} is a folder; give {listing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML file ({error})") from error
    tree, places = _parse(text, str(path))
    if "base" not in tree:
        return tree, places
    base = tree.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{locate(places, 'base')}: expected one file name, got {base!r}")
    under, under_places = _read(path.parent / base, (*above, path.resolve()))
    return _merge(under, tree), under_places | places


def _parse(text: str, origin: str) -> tuple[dict, Places]:
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
        raise ConfigError(f"{origin}{line}: not YAML: {_reason(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{locate(places, _error_path(error))}: {_reason(error)}") from error


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


def _assume(tree: dict, places: Places, assumed: Mapping[str, Any]) -> None:
    for path, value in assumed.items():
        *above, name = parts_of(path)
        node = _part(tree, above)
        present = node.get(name) if isinstance(node, dict) else None
        if present == "???" or (isinstance(present, str) and "${" in present and _leads_nowhere(tree, path)):
            node[name], places[path] = value, ASSUMED


def _leads_nowhere(tree: dict, path: str) -> bool:
    try:
        OmegaConf.select(OmegaConf.create(tree), path)
    except OmegaConfBaseException:
        return True
    return False


def _part(tree: dict, parts: Sequence[str]) -> Any:
    """What stands at a path of mappings; None where nothing does."""
    node: Any = tree
    for part in parts:
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _resolved(tree: dict, places: Places) -> DictConfig:
    config = OmegaConf.create(tree)
    config.__dict__[_PLACES] = places
    # Not OmegaConf.missing_keys: it also counts what only refers to an open value.
    missing = [path for path, value in _entries(tree) if value == "???"]
    if missing:
        how = "no value yet; give {}=VALUE on the command line"
        raise ConfigError(*(f"{locate(places, path)}: {how.format(path)}" for path in missing))
    problems = []
    for path in [path for path, value in _entries(tree) if isinstance(value, str) and "${" in value]:
        try:
            OmegaConf.select(config, path)
        except OmegaConfBaseException as error:
            problems += _said_by_resolver(error) or [f"{locate(places, path)}: {_reason(error)}"]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    OmegaConf.resolve(config)
    return config


def _said_by_resolver(error: BaseException | None) -> list[str]:
    """The problems of a ConfigError that a resolver of ours raised, which OmegaConf wraps in its own."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return [] if error is None else error.problems


def _error_path(error: OmegaConfBaseException) -> str:
    return ".".join(parts_of(getattr(error, "full_key", None) or ""))


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).strip().split("\n")[0]


# Overrides


def _override(tree: dict, places: Places, override: str, sections: Mapping[str, type]) -> None:
    """Write one `a.b.c=value` into the tree; ValueError says why it fits nothing."""
    key, equals, text = override.partition("=")
    parts = parts_of(key)
    if not equals or not parts:
        raise ValueError(f"no {'key' if equals else 'equals sign'}; {_OVERRIDE_FORM}")
    if not text.strip():
        raise ValueError(f"no value; write {key}=null for none, or {key}='\"\"' for an empty text")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"the value is not YAML: {_reason(error)}") from error
    node: Any = tree
    path, in_params = "", False  # where `node` stands, and whether that is a target's params
    for i, part in enumerate(parts):
        found = _find(node, part, path, in_params, tree, sections)
        if i == len(parts) - 1:
            is_part = isinstance(node, dict) and isinstance(node.get(found), dict)
            node[found] = _from_file(value, parts) if is_part and _names_file(value) else value
        elif isinstance(node, dict) and node.get(found) is None:
            node[found] = {}
        in_params = is_target(node) and found == "params"
        node, path = node[found], join(path, found)
    for stale in [p for p in places if p == path or p.startswith(path + ".")]:
        del places[stale]
    places[path] = "command line"


def _names_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def _from_file(file: str, parts: list[str]) -> dict:
    """The same part of another configuration: `network=configs/diffusion/dit-b-f8.yaml`."""
    other, _ = _read(Path(file), ())
    part = _part(other, parts)
    if not isinstance(part, dict):
        raise ValueError(f"{file} has no {'.'.join(parts)} to take (it has: {', '.join(map(str, other))})")
    return part


def _find(
    node: Any, name: str, path: str, in_params: bool, tree: dict, sections: Mapping[str, type]
) -> str | int:
    """The key or index of `node` (which stands at `path`) that `name` means."""
    if isinstance(node, list):
        if name.isdigit() and int(name) < len(node):
            return int(name)
        raise ValueError(f"{path} is a list of {len(node)}, which has no item '{name}'")
    if not isinstance(node, dict):
        raise ValueError(f"{path} is {node!r}, which holds no key '{name}'")
    if name in node:
        return name
    if name.isdigit() and int(name) in node:
        return int(name)
    fields = _fields(path, sections)
    if in_params or name in fields or (is_target(node) and name == "params") or _is_open(path, sections):
        return name
    options = list(dict.fromkeys([*map(str, node), *fields]))
    hint = did_you_mean(name, options, join(path, "")) or _elsewhere(name, tree)
    has = f"{path} has" if path else "there are"
    raise ValueError(f"unknown key '{join(path, name)}'{hint} ({has}: {', '.join(options) or 'nothing'})")


def _fields(path: str, sections: Mapping[str, type]) -> list[str]:
    """Names that the declared dataclasses allow at a path."""
    kind = _section_at(path, sections)
    declared = [section.rpartition(".") for section in sections if section]
    return [*(field_types(kind) if kind else ()), *(name for above, _, name in declared if above == path)]


def _is_open(path: str, sections: Mapping[str, type]) -> bool:
    """Whether a dataclass's field stands there whose keys are free: annotated `dict[str, ...]`."""
    above, _, name = path.rpartition(".")
    kind = _section_at(above, sections)
    return kind is not None and get_origin(field_types(kind).get(name)) is dict


def _section_at(path: str, sections: Mapping[str, type]) -> type | None:
    if path in sections or not path:
        return sections.get(path)
    above, _, name = path.rpartition(".")
    kind = _section_at(above, sections)
    return nested_dataclass(field_types(kind).get(name)) if kind else None


def _elsewhere(name: str, tree: dict) -> str:
    """The same or a near name at another place of the tree."""
    paths = {path.split(".")[-1]: path for path, _ in reversed(list(_entries(tree)))}
    near = nearest(name, paths)
    return f"; did you mean {paths[near]}?" if near else ""


def _entries(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of a tree, containers too, with its dotted path."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield join(path, name), value
        yield from _entries(value, join(path, name))


# Writing and comparing


def to_plain(config: Any) -> Any:
    """A configuration as plain dicts and lists of its own, interpolations resolved."""
    if isinstance(config, DictConfig | ListConfig):
        try:
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{locate(places_of(config), _error_path(error))}: {_reason(error)}") from error
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
    changed = [path for path in dict.fromkeys([*old, *new]) if not _same(old, new, path)]
    shown = [[repr(side[path]) if path in side else "(absent)" for side in (old, new)] for path in changed]
    return [f"{path}: {a} -> {b}" for path, (a, b) in zip(changed, shown, strict=True)]


def _same(old: dict, new: dict, path: str) -> bool:
    if path not in old or path not in new:
        return False
    a, b = old[path], new[path]
    return repr(a) == repr(b) or (a == b and not isinstance(a, bool) and not isinstance(b, bool))
