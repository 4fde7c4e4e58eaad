"""Whether plain values fit an annotation, and what is wrong where they do not."""

import collections.abc
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.config.signatures import is_target
from ldm.wording import did_you_mean

_SEQUENCES = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
    collections.abc.MutableSequence,
    collections.abc.Set,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def fitted(value: Any, annotation: Any) -> Any:
    """A plain value as its annotation wants it: `1e3` as a whole number, and a number as text where a Literal
    is so spelt (YAML reads `precision: 32` as a number); lists and mappings item by item."""
    choices = _choices(annotation)
    if isinstance(value, int | float) and not isinstance(value, bool):
        words = _words(choices)
        if value not in words and str(value) in words:
            return str(value)
        whole = int in choices and float not in choices and float(value).is_integer()
        return int(value) if whole else value
    for choice in choices:
        arguments, kind = typing.get_args(choice), _kind(choice)
        if isinstance(value, list) and kind in _SEQUENCES:
            kinds = _of_items(choice, len(value))
            return list(map(fitted, value, kinds)) if len(kinds) == len(value) else value
        if isinstance(value, dict) and kind in _MAPPINGS and len(arguments) == 2 and not is_target(value):
            return {key: fitted(item, arguments[1]) for key, item in value.items()}
        if isinstance(value, dict) and typing.is_typeddict(choice):
            allowed = typing.get_type_hints(choice)
            return {key: fitted(item, allowed.get(key, Any)) for key, item in value.items()}
    return value


def _choices(annotation: Any) -> list[Any]:
    """The annotations that a union leaves the choice of; one of another kind by itself."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _choices(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [choice for argument in arguments for choice in _choices(argument)]
    return [annotation]


def _kind(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation


def _of_items(annotation: Any, count: int) -> list[Any] | tuple[Any, ...]:
    """The annotations of the `count` items of a sequence; a tuple may allow another number."""
    arguments = typing.get_args(annotation)
    if _kind(annotation) is tuple and arguments and arguments[-1] is not Ellipsis:
        return arguments
    return [arguments[0] if arguments else Any] * count


def mismatch(value: Any, annotation: Any) -> str | None:
    """What is wrong with a plain value (None, bool, number, str, list, dict) for an annotation, or None.

    Checks what can be told from plain values; an annotation of another kind (a class of ours, a device, a
    callable) accepts everything, and so does a nested `target`, whose result is not known yet. A float such
    as 1000.0 is a whole number, see `fitted`.
    """
    if is_target(value):
        return None
    choices = _choices(annotation)
    if len(choices) > 1:
        return _union_mismatch(value, choices, annotation)
    (annotation,) = choices
    kind, arguments = _kind(annotation), typing.get_args(annotation)
    if kind is typing.Literal:
        return _literal_mismatch(value, arguments)
    if kind in _SEQUENCES:
        return _sequence_mismatch(value, annotation)
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
    if annotation in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (annotation is float or isinstance(value, int) or value.is_integer())
    if annotation is str or (isinstance(annotation, type) and issubclass(annotation, os.PathLike)):
        return isinstance(value, str | os.PathLike)
    return True


def _union_mismatch(value: Any, choices: list, annotation: Any) -> str | None:
    found = [mismatch(value, choice) for choice in choices]
    if None in found:
        return None
    # A list, a mapping or a misspelt word is best explained by the one choice that it was meant for.
    for choice, problem in zip(choices, found, strict=True):
        kind = _kind(choice)
        if isinstance(value, list) and kind in _SEQUENCES:
            return problem
        if isinstance(value, dict) and (kind in _MAPPINGS or typing.is_typeddict(choice)):
            return problem
    return _expected(annotation, value) + _near_word(value, _words(choices))


def _words(choices: Iterable[Any]) -> list[Any]:
    """What the Literals among annotations allow."""
    return [word for c in choices if _kind(c) is typing.Literal for word in typing.get_args(c)]


def _near_word(value: Any, words: Iterable[Any]) -> str:
    return did_you_mean(value, [w for w in words if isinstance(w, str)]) if isinstance(value, str) else ""


def _literal_mismatch(value: Any, choices: tuple) -> str | None:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return None
    allowed = ", ".join(map(repr, choices))
    return f"must be one of {allowed}, got {value!r}{_near_word(value, choices)}"


def _sequence_mismatch(value: Any, annotation: Any) -> str | None:
    if not isinstance(value, list | tuple):
        return _expected(annotation, value)
    kinds = _of_items(annotation, len(value))
    if len(value) != len(kinds):
        return f"expected {len(kinds)} values ({describe(annotation)}), got {len(value)}"
    for i, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        if problem := mismatch(item, kind):
            return f"item {i}: {problem}"
    return None


def _mapping_mismatch(value: Any, arguments: tuple, annotation: Any) -> str | None:
    if not isinstance(value, Mapping):
        return _expected(annotation, value)
    for key, item in value.items() if len(arguments) == 2 else ():
        if problem := mismatch(key, arguments[0]) or mismatch(item, arguments[1]):
            return f"key '{key}': {problem}"
    return None


def _typed_dict_mismatch(value: Any, annotation: Any) -> str | None:
    if not isinstance(value, Mapping):
        return _expected(annotation, value)
    allowed = typing.get_type_hints(annotation)
    for key, item in value.items():
        if key not in allowed:
            return f"unknown key '{key}'{did_you_mean(key, allowed)} (allowed: {', '.join(allowed)})"
        if problem := mismatch(item, allowed[key]):
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
