"""`a.b.c=value` on the command line: where in the tree it belongs, and what it may say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.signatures import field_types, is_target, nested_dataclass
from ldm.config.tree import ASSUMED, Places, entries, join, parts_of, reason_of
from ldm.config.yaml_files import read
from ldm.wording import did_you_mean, nearest

_FORM = "write it as a.b.c=value, for example training.steps=1000"


def override(tree: dict, places: Places, text: str, sections: Mapping[str, type]) -> None:
    """Write one `a.b.c=value` into the tree; see `ldm.config.load`.

    Raises:
        ValueError: it fits nothing, and why.
    """
    key, value = _parsed(text)
    parts = parts_of(key)
    node: Any = tree
    path, in_params = "", False  # where `node` stands, and whether that is a target's params
    for i, part in enumerate(parts):
        found = _find(node, part, path, in_params, tree, sections)
        if i == len(parts) - 1:
            is_file = isinstance(value, str) and value.endswith((".yaml", ".yml"))
            is_part = isinstance(node, dict) and isinstance(node.get(found), dict)
            node[found] = _from_file(value, parts) if is_part and is_file else value
        elif isinstance(node, dict) and node.get(found) is None:
            node[found] = {}
        in_params = is_target(node) and found == "params"
        node, path = node[found], join(path, found)
    for stale in [p for p in places if p == path or p.startswith(path + ".")]:
        del places[stale]
    places[path] = "command line"


def _parsed(text: str) -> tuple[str, Any]:
    key, equals, written = text.partition("=")
    if not equals or not parts_of(key):
        raise ValueError(f"no {'key' if equals else 'equals sign'}; {_FORM}")
    if not written.strip():
        raise ValueError(f"no value; write {key}=null for none, or {key}='\"\"' for an empty text")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"the value is not YAML: {reason_of(error)}") from error
    return key, value


def _from_file(file: str, parts: list[str]) -> dict:
    """The same part of another configuration: `network=configs/diffusion/dit-b-f8.yaml`."""
    other, _ = read(Path(file))
    part = _part_at(other, parts)
    if not isinstance(part, dict):
        raise ValueError(f"{file} has no {'.'.join(parts)} to take (it has: {', '.join(map(str, other))})")
    return part


def _part_at(tree: dict, parts: list[str]) -> Any:
    """What stands at a path of mappings; None where nothing does."""
    node: Any = tree
    for part in parts:
        node = node.get(part) if isinstance(node, dict) else None
    return node


def assume(tree: dict, places: Places, assumed: Mapping[str, Any]) -> None:
    """Put values in the place of what is open or refers to something that is not there."""
    for path, value in assumed.items():
        *above, name = parts_of(path)
        node = _part_at(tree, above)
        if isinstance(node, dict) and name in node and _is_open(tree, path):
            node[name], places[path] = value, ASSUMED


def _is_open(tree: dict, path: str) -> bool:
    try:
        OmegaConf.select(OmegaConf.create(tree), path, throw_on_missing=True)
    except OmegaConfBaseException:
        return True
    return False


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
    annotation = _annotation_at(path, sections)
    fields = _fields(path, annotation, sections)
    any_key = in_params or (not fields and get_origin(annotation) is dict)
    if any_key or name in fields or (is_target(node) and name == "params"):
        return name
    options = list(dict.fromkeys([*map(str, node), *fields]))
    hint = did_you_mean(name, options, join(path, "")) or _elsewhere(name, tree)
    has = f"{path} has" if path else "there are"
    raise ValueError(f"unknown key '{join(path, name)}'{hint} ({has}: {', '.join(options) or 'nothing'})")


def _annotation_at(path: str, sections: Mapping[str, type]) -> Any:
    """What the declared dataclasses say about a path; None where they say nothing."""
    if path in sections or not path:
        return sections.get(path)
    above, _, name = path.rpartition(".")
    kind = nested_dataclass(_annotation_at(above, sections))
    return field_types(kind).get(name) if kind else None


def _fields(path: str, annotation: Any, sections: Mapping[str, type]) -> list[str]:
    """Names that the declared dataclasses allow at a path."""
    kind = nested_dataclass(annotation)
    declared = [section.rpartition(".") for section in sections if section]
    return [*(field_types(kind) if kind else ()), *(name for above, _, name in declared if above == path)]


def _elsewhere(name: str, tree: dict) -> str:
    """The same or a near name at another place of the tree."""
    paths = {path.split(".")[-1]: path for path, _ in reversed(list(entries(tree)))}
    near = nearest(name, paths)
    return f"; did you mean {paths[near]}?" if near else ""
