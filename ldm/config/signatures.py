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

PACKAGE = "ldm"
# Rooms whose classes open and write files: a configuration that came inside a checkpoint must not reach them.
_TOOLS = (
    "ldm.checkpoints",
    "ldm.cli",
    "ldm.config",
    "ldm.evaluation",
    "ldm.files",
    "ldm.planning",
    "ldm.sampling",
    "ldm.training",
    "ldm.weights",
)


def is_package_path(target: str) -> bool:
    return target.split(".")[0] == PACKAGE


def resolve_target(target: str, allow_foreign: bool | Collection[str] = False) -> Any:
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
    if not isinstance(allow_foreign, bool):
        allow_foreign = target in allow_foreign
    if not is_package_path(target) and not allow_foreign:
        raise ValueError(
            f"target '{target}' is outside ldm; such code runs only where a YAML that you name has it too "
            "(for a file of weights: --config YAML, config=... in Python)"
        )
    if not allow_foreign:
        _refuse_tools(target, target)
    found = _import(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        found = _step(found, ".".join(parts[:i]), part)
        if is_package_path(target) and not _is_own(found):
            raise ValueError(f"target '{target}': {'.'.join(parts[: i + 1])} is not a part of ldm")
    if is_package_path(target):
        if not isinstance(found, type):
            raise ValueError(f"target '{target}' is a {type(found).__name__}; inside ldm it must be a class")
        if not allow_foreign:
            _refuse_tools(target, found.__module__)
    elif not callable(found):
        raise ValueError(f"target '{target}' is a {type(found).__name__}, which cannot be called")
    return found


def _refuse_tools(target: str, path: str) -> None:
    if any(path == room or path.startswith(room + ".") for room in _TOOLS):
        raise ValueError(f"target '{target}' is a tool around models, not a part of one")


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"cannot import {name}: {error}") from error


def _step(parent: Any, parent_path: str, part: str) -> Any:
    if hasattr(parent, part):
        return getattr(parent, part)
    options = [name for name in getattr(parent, "__dict__", ()) if not name.startswith("_")]
    if hasattr(parent, "__path__"):
        submodules = [module.name for module in pkgutil.iter_modules(parent.__path__)]
        if part in submodules:
            return _import(f"{parent_path}.{part}")
        options = submodules + options
    raise ValueError(f"{parent_path} has no '{part}'" + did_you_mean(part, options, f"{parent_path}."))


def _is_own(thing: Any) -> bool:
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return isinstance(name, str) and is_package_path(name)


def parameters(function: Any) -> dict[str, inspect.Parameter] | None:
    """Keyword parameters of a callable by name; None where any name goes or the signature is unknown."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):  # an annotation that cannot be evaluated here
        signature = inspect.signature(function)
    except ValueError:  # built in C, no signature
        return None
    found = signature.parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()):
        return None
    return {n: p for n, p in found.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def missing_parameters(function: Any, given: Collection[str]) -> list[str]:
    """Names that have no default and are not given, also of a callable that takes any keyword."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return []
    return [
        name
        for name, p in signature.parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given
    ]


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
