"""Holding a configuration against the code: parts against signatures, plain sections against dataclasses."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig

from ldm.arguments import record, recorded
from ldm.config import signatures
from ldm.config.annotations import fitted, mismatch
from ldm.config.provided import AUTO, Declared, names_for
from ldm.config.signatures import Trust, field_types, is_target, nested_dataclass
from ldm.config.tree import ConfigError, Places, entries, join, locate, path_of, places_of, to_plain
from ldm.wording import did_you_mean

T = TypeVar("T")


def check(
    config: DictConfig | Mapping,
    allow_foreign: Trust = False,
    provided: Declared | None = None,
    offered: Declared | None = None,
) -> None:
    """Hold every `target` and its params against the code, nested ones and those in lists too.

    Args:
        config: from `load`, or a part of it, or a plain mapping.
        allow_foreign: also import targets outside `ldm` (only for a YAML that the user named): all, or these.
        provided: by the dotted path of a part (`*` stands for anything), the parameters that `instantiate`
            will get from the program and that a YAML may not set.
        offered: likewise the parameters that `fill` will put in where the YAML leaves them open.

    Raises:
        ConfigError: every unknown target, unknown or missing parameter and mistyped value, one a line, as
            `file:line: full.path: what; did you mean ...?`.
    """
    places, problems = places_of(config), []
    for path, node in entries(to_plain(config), path_of(config)):
        if is_target(node):
            names = names_for(provided or {}, path), names_for(offered or {}, path)
            problems += _problems(node, path, places, allow_foreign, *names)
        elif isinstance(node, dict) and "params" in node:
            problems.append(f"{locate(places, join(path, 'params'))}: params without a target beside it")
    if problems:
        raise ConfigError(*problems)


def _problems(
    node: dict, path: str, places: Places, allow_foreign: Trust, provided: set[str], offered: set[str]
) -> Iterator[str]:
    """What is wrong with one mapping with a `target`, without the targets nested in it."""
    for name in node:
        if name not in ("target", "params"):
            yield f"{locate(places, join(path, name))}: stands beside target; move it under params"
    params_path = join(path, "params")
    params = {} if node.get("params") is None else node["params"]
    if not isinstance(params, dict):
        yield f"{locate(places, params_path)}: expected a mapping of parameters, got {params!r}"
        return
    try:
        function = signatures.resolve_target(node["target"], allow_foreign)
    except ValueError as error:
        yield f"{locate(places, join(path, 'target'))}: {error}"
        return
    accepted = signatures.parameters(function)
    names = [name for name in accepted or () if name not in provided]
    for name, value in params.items():
        where = locate(places, join(params_path, name))
        if name in provided:
            yield f"{where}: comes from the program and cannot be set here"
        elif accepted is None or (name in offered and name in accepted and value == AUTO):
            continue
        elif name not in accepted:
            hint = did_you_mean(name, names)
            yield f"{where}: unknown{hint} ({node['target']} takes: {', '.join(names) or 'nothing'})"
        elif problem := mismatch(value, accepted[name].annotation):
            yield f"{where}: {problem}"
    if missing := signatures.missing_parameters(function, {*params, *provided, *offered}):
        yield f"{locate(places, params_path)}: {node['target']} also needs {', '.join(missing)}"


def check_section(section: DictConfig | Mapping | None, kind: type[T], path: str = "") -> T:
    """A plain section (a mapping, or None for defaults) as an instance of its dataclass, nested ones too.

    The fields of `kind` are the allowed keys, their annotations the allowed values; `path` is for messages.

    Raises:
        ConfigError: unknown or missing keys, mistyped values, or what the dataclass itself refuses.
    """
    values = {} if section is None else to_plain(section)
    return _made(values, kind, path or path_of(section), places_of(section))


def _made(values: Any, kind: type[T], path: str, places: Places) -> T:
    annotations = field_types(kind)
    if not isinstance(values, dict):
        keys = ", ".join(annotations)
        raise ConfigError(f"{locate(places, path)}: expected a mapping of {keys}, got {values!r}")
    problems, given = [], {}
    for name, value in values.items():
        where, annotation = join(path, name), annotations.get(name)
        nested = nested_dataclass(annotation)
        if name not in annotations:
            hint = did_you_mean(name, annotations, join(path, ""))
            problems.append(f"{locate(places, where)}: unknown{hint} (allowed: {', '.join(annotations)})")
        elif nested is not None and (value is not None or annotation is nested):
            try:  # `training:` with nothing behind it means the defaults
                given[name] = _made({} if value is None else value, nested, where, places)
            except ConfigError as error:
                problems += error.problems
        elif problem := mismatch(value, annotation):
            problems.append(f"{locate(places, where)}: {problem}")
        else:
            given[name] = fitted(value, annotation)
    if missing := signatures.missing_parameters(kind, values):
        problems.append(f"{locate(places, path)}: also needs {', '.join(missing)}")
    if problems:
        raise ConfigError(*problems)
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{locate(places, path)}: {error}") from error


def instantiate(config: DictConfig | Mapping, /, *, allow_foreign: Trust = False, **extra: Any) -> Any:
    """Build what a `target` names from its params, nested targets first; `extra` goes to the outermost only.

    Plain mappings and lists among the params are handed over as dict and list, numbers as the signature wants
    them (see `fitted`). What is built remembers target and params (`ldm.arguments`).

    Raises:
        ConfigError: not a part, a target that may not be called, or from the constructor's own ValueError,
            TypeError, KeyError, ImportError or OSError, with the YAML path in front.
    """
    path, places, node = path_of(config), places_of(config), to_plain(config)
    if not is_target(node):
        raise ConfigError(f"{locate(places, path)}: expected a mapping with a target, got {node!r}")
    return _build(node, path, places, allow_foreign, extra)


def _build(node: Any, path: str, places: Places, allow_foreign: Trust, extra: Mapping[str, Any]) -> Any:
    def inner(items: Mapping, above: str) -> dict:
        return {n: _build(item, join(above, n), places, allow_foreign, {}) for n, item in items.items()}

    if isinstance(node, list):
        return list(inner(dict(enumerate(node)), path).values())
    if not isinstance(node, dict):
        return node
    if not is_target(node):
        return inner(node, path)
    given, params_path = node.get("params") or {}, join(path, "params")
    if twice := sorted(given.keys() & extra.keys()):
        raise ConfigError(f"{locate(places, params_path)}: {', '.join(twice)} comes from the program")
    try:
        function = signatures.resolve_target(node["target"], allow_foreign)
        accepted = signatures.parameters(function) or {}
        given = {n: fitted(v, accepted[n].annotation) if n in accepted else v for n, v in given.items()}
        params = inner(given, params_path)
        made = function(**params, **extra)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        raise ConfigError(f"{locate(places, path)} ({node['target']}): {error}") from error
    # What a function gives may remember more of itself than that function was told.
    if type(made) is function or recorded(made) is None:
        record(made, node["target"], params | dict(extra))
    return made
