"""What a dotted path names, and whether plain values fit a callable's signature.

`ldm.config` holds a YAML file against the code with these functions before anything slow starts. Standard
library only; nothing outside `ldm` is imported unless the caller allows it.
"""

import collections.abc
import dataclasses
import importlib
import inspect
import os
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
_SEQUENCES = (list, tuple, set, frozenset)
_ABSTRACT_SEQUENCES = (
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
    collections.abc.MutableSequence,
    collections.abc.Set,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


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


def as_word(value: Any, annotation: Any) -> Any:
    """A number as text where a Literal is so spelt: YAML reads `precision: 32` as a number."""
    choices = (annotation, *typing.get_args(annotation))
    words = [w for c in choices if typing.get_origin(c) is typing.Literal for w in typing.get_args(c)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and value not in words and str(value) in words else value


def is_target(value: Any) -> bool:
    return isinstance(value, Mapping) and "target" in value


def mismatch(value: Any, annotation: Any) -> str | None:
    """What is wrong with a plain value (None, bool, number, str, list, dict) for an annotation, or None.

    Checks what can be told from plain values; an annotation of another kind (a class of ours, a device, a
    callable) accepts everything, and so does a nested `target`, whose result is not known yet.
    """
    if is_target(value):
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return mismatch(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _union_mismatch(value, arguments, annotation)
    if origin is typing.Literal:
        return _literal_mismatch(value, arguments)
    kind = origin or annotation
    if kind in _SEQUENCES or kind in _ABSTRACT_SEQUENCES:
        return _sequence_mismatch(value, kind, arguments, annotation)
    if kind in _MAPPINGS:
        return _mapping_mismatch(value, arguments, annotation)
    if typing.is_typeddict(annotation):
        return _typed_dict_mismatch(value, annotation)
    return None if _fits_scalar(value, annotation) else _expected(annotation, value)


def _fits_scalar(value: Any, annotation: Any) -> bool:
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is str or (isinstance(annotation, type) and issubclass(annotation, os.PathLike)):
        return isinstance(value, str | os.PathLike)
    return True


def _union_mismatch(value: Any, choices: tuple, annotation: Any) -> str | None:
    found = [mismatch(value, choice) for choice in choices]
    if None in found:
        return None
    # A list, a mapping or a misspelt word is best explained by the one choice that it was meant for.
    for choice, problem in zip(choices, found, strict=True):
        kind = typing.get_origin(choice) or choice
        if isinstance(value, list) and (kind in _SEQUENCES or kind in _ABSTRACT_SEQUENCES):
            return problem
        if isinstance(value, dict) and (kind in _MAPPINGS or typing.is_typeddict(choice)):
            return problem
    literals = [choice for choice in choices if typing.get_origin(choice) is typing.Literal]
    words = [word for choice in literals for word in typing.get_args(choice)]
    return _expected(annotation, value) + (did_you_mean(value, words) if isinstance(value, str) else "")


def _literal_mismatch(value: Any, choices: tuple) -> str | None:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return None
    allowed = ", ".join(map(repr, choices))
    hint = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    return f"must be one of {allowed}, got {value!r}{hint}"


def _sequence_mismatch(value: Any, kind: Any, arguments: tuple, annotation: Any) -> str | None:
    if not isinstance(value, list | tuple):
        return _expected(annotation, value)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return f"expected {len(arguments)} values ({describe(annotation)}), got {len(value)}"
        pairs = zip(value, arguments, strict=True)
    else:
        pairs = ((item, arguments[0] if arguments else Any) for item in value)
    for i, (item, item_annotation) in enumerate(pairs):
        problem = mismatch(item, item_annotation)
        if problem:
            return f"item {i}: {problem}"
    return None


def _mapping_mismatch(value: Any, arguments: tuple, annotation: Any) -> str | None:
    if not isinstance(value, Mapping):
        return _expected(annotation, value)
    for key, item in value.items() if len(arguments) == 2 else ():
        problem = mismatch(key, arguments[0]) or mismatch(item, arguments[1])
        if problem:
            return f"key '{key}': {problem}"
    return None


def _typed_dict_mismatch(value: Any, annotation: Any) -> str | None:
    if not isinstance(value, Mapping):
        return _expected(annotation, value)
    allowed = typing.get_type_hints(annotation)
    for key, item in value.items():
        if key not in allowed:
            return f"unknown key '{key}'{did_you_mean(key, allowed)} (allowed: {', '.join(allowed)})"
        problem = mismatch(item, allowed[key])
        if problem:
            return f"key '{key}': {problem}"
    missing = sorted(annotation.__required_keys__ - set(value))
    return f"needs the keys {', '.join(missing)}" if missing else None


def _expected(annotation: Any, value: Any) -> str:
    given = "null" if value is None else f"{value!r} ({type(value).__name__})"
    return f"expected {describe(annotation)}, got {given}"


def describe(annotation: Any) -> str:
    """An annotation as a person writes it: `int | None`, `list[int]`, 'a' | 'b'."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if annotation is type(None) or annotation is None:
        return "null"
    if origin is not None and arguments:
        inner = ", ".join("..." if a is Ellipsis else describe(a) for a in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))
