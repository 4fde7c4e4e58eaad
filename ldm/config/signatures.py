"""What a dotted path names, and which parameters it takes.

Nothing outside `ldm` is imported unless the caller allows it.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ldm.wording import did_you_mean

# Rooms whose classes open and write files: a configuration that came inside a checkpoint must not reach them.
_TOOLS = {
    "checkpoints",
    "cli",
    "config",
    "evaluation",
    "files",
    "planning",
    "sampling",
    "training",
    "weights",
}
Trust = bool | Collection[str]  # in targets outside `ldm`: in all or none, or in these
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def resolve_target(target: str, allow_foreign: Trust = False) -> Any:
    """The class (or, outside `ldm`, the callable) that a dotted path names.

    Inside `ldm` a target is a class that `ldm` itself defines: a path may not walk through a module to what
    that module imported (`ldm.config.os.system`), nor to functions, some of which write files. Anything else
    is imported only with `allow_foreign`: True, or the targets that are trusted.

    Raises:
        ValueError: the path is no such thing; says where it broke off and the nearest right name.
    """
    if not isinstance(target, str):
        raise ValueError(f"expected a dotted path, got {target!r}")
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise ValueError(f"target '{target}' is not a dotted path such as ldm.models.unet.UNetModel")
    own, trusted = parts[0] == "ldm", allow_foreign is True or (allow_foreign and target in allow_foreign)
    if not own and not trusted:
        raise ValueError(f"target '{target}' is outside ldm, and no YAML that you name (--config) has it")
    if own and not trusted:
        _refuse_tools(target, parts)
    found = _import(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        found = _step(found, ".".join(parts[:i]), part)
        if own and _home(found)[0] != "ldm":
            raise ValueError(f"target '{target}': {'.'.join(parts[: i + 1])} is not a part of ldm")
    if own and not isinstance(found, type):
        raise ValueError(f"target '{target}' is a {type(found).__name__}; inside ldm it must be a class")
    if own and not trusted:
        _refuse_tools(target, _home(found))
    if not callable(found):
        raise ValueError(f"target '{target}' is a {type(found).__name__}, which cannot be called")
    return found


def _refuse_tools(target: str, home: list[str]) -> None:
    if _TOOLS.intersection(home[1:2]):
        raise ValueError(f"target '{target}' is a tool around models, not a part of one")


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"cannot import {name}: {error}") from error


def _step(parent: Any, parent_path: str, part: str) -> Any:
    if hasattr(parent, part):
        return getattr(parent, part)
    modules = [module.name for module in pkgutil.iter_modules(getattr(parent, "__path__", ()))]
    if part in modules:
        return _import(f"{parent_path}.{part}")
    names = [name for name in getattr(parent, "__dict__", ()) if not name.startswith("_")]
    raise ValueError(f"{parent_path} has no '{part}'{did_you_mean(part, modules + names, f'{parent_path}.')}")


def _home(thing: Any) -> list[str]:
    """The parts of the dotted path of a module, or of the one that defines a thing."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return str(name).split(".")


def parameters(function: Any) -> dict[str, inspect.Parameter] | None:
    """Keyword parameters of a callable by name; None where any name goes or the signature is unknown."""
    found = _signature(function)
    if found is None or any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return None
    return {name: p for name, p in found.items() if p.kind in _KEYWORD}


def missing_parameters(function: Any, given: Collection[str]) -> list[str]:
    """Names that have no default and are not given, also of a callable that takes any keyword."""
    needed = {n: p for n, p in (_signature(function) or {}).items() if p.default is p.empty}
    return [name for name, p in needed.items() if p.kind in _KEYWORD and name not in given]


def _signature(function: Any) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, SyntaxError):  # an annotation that cannot be evaluated here
        return inspect.signature(function).parameters
    except ValueError:  # built in C, no signature
        return None


def field_types(kind: type) -> dict[str, Any]:
    """A dataclass's init fields and their annotations, those that it only takes (`InitVar`) last."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return found | {n: hint.type for n, hint in hints.items() if isinstance(hint, dataclasses.InitVar)}


def nested_dataclass(annotation: Any) -> type | None:
    """The dataclass that an annotation is, or holds beside None."""
    choices = typing.get_args(annotation) or (annotation,)
    return next((c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def is_target(value: Any) -> bool:
    return isinstance(value, Mapping) and "target" in value
