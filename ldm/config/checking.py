"""YAML in, objects out.

A configuration is a tree of plain sections (`training: {steps: 1000}`) and of parts that name their class
(`target: ldm.models.unet.UNetModel`, `params: {...}`). `load` reads a file and merges overrides, `check`
holds every part against the signature of its class before anything slow starts, `check_section` does the same
for a plain section and its dataclass, and `instantiate` builds. A mistake is a `ConfigError` that names file,
line and full path; all mistakes of a file are reported together.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig

from ldm.arguments import record, recorded
from ldm.config import signatures
from ldm.config.signatures import as_word, field_types, is_target, nested_dataclass
from ldm.config.tree import ConfigError, Places, join, locate, parts_of, path_of, places_of, to_plain
from ldm.wording import did_you_mean

T = TypeVar("T")


def check(
    config: DictConfig | Mapping,
    allow_foreign: bool | Collection[str] = False,
    provided: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Hold every `target` and its params against the code, nested ones and those in lists too.

    Args:
        config: from `load`, or a part of it, or a plain mapping.
        allow_foreign: also import targets outside `ldm` (only for a YAML that the user named): all, or these.
        provided: by the dotted path of a part, the parameters that `instantiate` will get from the program.

    Raises:
        ConfigError: every unknown target, unknown or missing parameter and mistyped value, one a line, as
            `file:line: full.path: what; did you mean ...?`.
    """
    checked = _check(to_plain(config), path_of(config), places_of(config), allow_foreign, provided or {})
    problems = list(dict.fromkeys(checked))
    if problems:
        raise ConfigError(*problems)


def _check(
    node: Any, path: str, places: Places, allow_foreign: bool | Collection[str], provided: Mapping
) -> Iterator[str]:
    if isinstance(node, dict):
        if is_target(node):
            yield from _check_part(node, path, places, allow_foreign, provided.get(path, ()))
        elif "params" in node:
            yield f"{locate(places, join(path, 'params'))}: params without a target beside it"
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield from _check(value, join(path, name), places, allow_foreign, provided)


def _check_part(
    node: dict, path: str, places: Places, allow_foreign: bool | Collection[str], provided: Collection[str]
) -> Iterator[str]:
    """One mapping with a `target`, without the targets nested in it."""
    for name in node:
        if name not in ("target", "params"):
            yield f"{locate(places, join(path, name))}: stands beside target; move it under params"
    params = node.get("params")
    params = {} if params is None else params
    if not isinstance(params, dict):
        yield f"{locate(places, join(path, 'params'))}: expected a mapping of parameters, got {params!r}"
        return
    try:
        function = _resolve(node["target"], allow_foreign)
    except ValueError as error:
        yield f"{locate(places, join(path, 'target'))}: {error}"
        return
    yield from _check_params(function, params, path, places, provided, node["target"])


def _check_params(
    function: Any, params: dict, path: str, places: Places, provided: Collection[str], target: str
) -> Iterator[str]:
    accepted = signatures.parameters(function)
    names = [name for name in accepted or () if name not in provided]
    for name, value in params.items():
        where = locate(places, join(join(path, "params"), name))
        if name in provided:
            yield f"{where}: comes from the program and cannot be set here"
        elif accepted is not None and name not in accepted:
            hint = did_you_mean(name, names)
            yield f"{where}: unknown{hint} ({target} takes: {', '.join(names) or 'nothing'})"
        elif accepted is not None and (problem := signatures.mismatch(value, accepted[name].annotation)):
            yield f"{where}: {problem}"
    missing = signatures.missing_parameters(function, {*params, *provided})
    if missing:
        yield f"{locate(places, join(path, 'params'))}: {target} also needs {', '.join(missing)}"


def _resolve(target: Any, allow_foreign: bool | Collection[str]) -> Any:
    if not isinstance(target, str):
        raise ValueError(f"expected a dotted path, got {target!r}")
    return signatures.resolve_target(target, allow_foreign)


def check_section(section: DictConfig | Mapping | None, kind: type[T], path: str = "") -> T:
    """A plain section as an instance of its dataclass; nested dataclasses are filled too.

    Args:
        section: a part of a loaded configuration, a mapping, or None for all defaults.
        kind: the dataclass; its fields are the allowed keys, their annotations the allowed values.
        path: the section's dotted path, for the messages.

    Raises:
        ConfigError: unknown or missing keys, mistyped values, or what the dataclass itself refuses.
    """
    values = {} if section is None else to_plain(section)
    path = ".".join(parts_of(path)) or path_of(section)
    return _fill(values, kind, path, places_of(section))


def _fill(values: Any, kind: type[T], path: str, places: Places) -> T:
    annotations = field_types(kind)
    if not isinstance(values, dict):
        keys = ", ".join(annotations)
        raise ConfigError(f"{locate(places, path)}: expected a mapping of {keys}, got {values!r}")
    problems, given = [], {}
    for name, value in values.items():
        where, full = locate(places, join(path, name)), join(path, "")
        nested = nested_dataclass(annotations.get(name))
        if name not in annotations:
            hint = did_you_mean(name, annotations, full)
            problems.append(f"{where}: unknown{hint} (allowed: {', '.join(annotations)})")
        elif nested is not None and not (value is None and annotations[name] is not nested):
            try:  # `training:` with nothing behind it means the defaults
                given[name] = _fill({} if value is None else value, nested, join(path, name), places)
            except ConfigError as error:
                problems += error.problems
        elif problem := signatures.mismatch(as_word(value, annotations[name]), annotations[name]):
            problems.append(f"{where}: {problem}")
        else:
            given[name] = as_word(value, annotations[name])
    missing = signatures.missing_parameters(kind, values)
    if missing:
        problems.append(f"{locate(places, path)}: also needs {', '.join(missing)}")
    if problems:
        raise ConfigError(*problems)
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{locate(places, path)}: {error}") from error


def instantiate(
    config: DictConfig | Mapping, /, *, allow_foreign: bool | Collection[str] = False, **extra: Any
) -> Any:
    """Build what a `target` names from its params, nested targets first; `extra` goes to the outermost only.

    Plain mappings and lists among the params are handed over as dict and list. What is built remembers target
    and params (`ldm.arguments`), so that a model with it can be saved.

    Raises:
        ConfigError: not a part, a target that may not be called, or the constructor's own ValueError,
            TypeError, KeyError, ImportError or OSError with the YAML path in front (the original is its
            `__cause__`).
    """
    path, places, node = path_of(config), places_of(config), to_plain(config)
    if not is_target(node):
        raise ConfigError(f"{locate(places, path)}: expected a mapping with a target, got {node!r}")
    return _build(node, path, places, allow_foreign, extra)


def _build(
    node: Any, path: str, places: Places, allow_foreign: bool | Collection[str], extra: Mapping[str, Any]
) -> Any:
    if isinstance(node, list):
        return [_build(item, join(path, i), places, allow_foreign, {}) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if not is_target(node):
        return {name: _build(v, join(path, name), places, allow_foreign, {}) for name, v in node.items()}
    given, params_path = node.get("params") or {}, join(path, "params")
    twice = sorted(given.keys() & extra.keys())
    if twice:
        raise ConfigError(f"{locate(places, params_path)}: {', '.join(twice)} comes from the program")
    params = {n: _build(v, join(params_path, n), places, allow_foreign, {}) for n, v in given.items()}
    try:
        function = _resolve(node["target"], allow_foreign)
        made = function(**params, **extra)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        raise ConfigError(f"{locate(places, path)} ({node['target']}): {error}") from error
    # What a function gives may remember more of itself than that function was told.
    if type(made) is function or recorded(made) is None:
        record(made, node["target"], params | dict(extra))
    return made
