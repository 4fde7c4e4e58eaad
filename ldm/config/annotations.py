"""Whether plain values fit an annotation, and what is wrong where they do not."""

import os
import types
import typing
from collections import abc
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.config.signatures import is_target
from ldm.wording import did_you_mean

_SEQUENCES = (list, tuple, set, frozenset, abc.Sequence, abc.Iterable, abc.Collection, abc.Set)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


def fitted(value: Any, annotation: Any) -> Any:
    """A plain value as its annotation wants it: `1e3` as a whole number, and a number as text where a Literal
    is so spelt (YAML reads `precision: 32` as a number); lists and mappings item by item."""
    return _held(value, annotation)[0]


def mismatch(value: Any, annotation: Any) -> str | None:
    """What is wrong with a plain value (None, bool, number, str, list, dict) for an annotation, or None.

    Checks what can be told from plain values; an annotation of another kind (a class of ours, a device, a
    callable) accepts everything, and so does a nested `target`, whose result is not known yet.
    """
    return _held(value, annotation)[1]


def _held(value: Any, annotation: Any) -> tuple[Any, str | None]:
    """The value as the annotation wants it, and what is wrong with it."""
    choices = _choices(annotation)
    if is_target(value):
        return value, None
    if len(choices) > 1:
        return _held_by_one(value, choices, annotation)
    (annotation,) = choices
    kind = _kind(annotation)
    if kind in _SEQUENCES:
        return _held_sequence(value, annotation)
    if kind in _MAPPINGS or typing.is_typeddict(annotation):
        return _held_mapping(value, annotation)
    if kind is typing.Literal:
        return _held_word(value, typing.get_args(annotation))
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value), None
    return value, None if _fits_scalar(value, annotation) else _expected(annotation, value)


def _fits_scalar(value: Any, annotation: Any) -> bool:
    if annotation is None or annotation is type(None):
        return value is None
    if annotation in (int, float):
        return isinstance(value, int | annotation) and not isinstance(value, bool)
    if annotation is str or (isinstance(annotation, type) and issubclass(annotation, os.PathLike)):
        return isinstance(value, str | os.PathLike)
    return annotation is not bool or isinstance(value, bool)


def _choices(annotation: Any) -> list[Any]:
    """The annotations that a union leaves the choice of; one of another kind by itself."""
    kind, arguments = _kind(annotation), typing.get_args(annotation)
    if kind is typing.Annotated:
        return _choices(arguments[0])
    if kind in (typing.Union, types.UnionType):
        return [choice for argument in arguments for choice in _choices(argument)]
    return [annotation]


def _kind(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation


def _held_by_one(value: Any, choices: list, annotation: Any) -> tuple[Any, str | None]:
    """By the first choice that fits, float before int: 1e3 stays what it is where both are allowed."""
    choices = sorted(choices, key=lambda choice: choice is not float)
    tried = [_held(value, choice) for choice in choices]
    for found, problem in tried:
        if problem is None:
            return found, None
    # A list, a mapping or a misspelt word is best explained by the one choice that it was meant for.
    for choice, (_, problem) in zip(choices, tried, strict=True):
        meant = _kind(choice) in _MAPPINGS or typing.is_typeddict(choice)
        if (isinstance(value, dict) and meant) or (isinstance(value, list) and _kind(choice) in _SEQUENCES):
            return value, problem
    words = [word for c in choices if _kind(c) is typing.Literal for word in typing.get_args(c)]
    return value, _expected(annotation, value) + did_you_mean(value, words)


def _held_word(value: Any, words: Sequence[Any]) -> tuple[Any, str | None]:
    if any(value == word and type(value) is type(word) for word in words):
        return value, None
    if isinstance(value, int | float) and not isinstance(value, bool) and str(value) in words:
        return str(value), None
    allowed = ", ".join(map(repr, words))
    return value, f"must be one of {allowed}, got {value!r}{did_you_mean(value, words)}"


def _held_sequence(value: Any, annotation: Any) -> tuple[Any, str | None]:
    if not isinstance(value, list | tuple):
        return value, _expected(annotation, value)
    kinds = typing.get_args(annotation)
    if _kind(annotation) is not tuple or not kinds or kinds[-1] is Ellipsis:  # any number of one kind
        kinds = (kinds or (Any,))[:1] * len(value)
    if len(value) != len(kinds):
        return value, f"expected {len(kinds)} values ({describe(annotation)}), got {len(value)}"
    items = [_held(item, kind) for item, kind in zip(value, kinds, strict=True)]
    problems = [f"item {i}: {problem}" for i, (_, problem) in enumerate(items) if problem]
    return [item for item, _ in items], problems[0] if problems else None


def _held_mapping(value: Any, annotation: Any) -> tuple[Any, str | None]:
    if not isinstance(value, Mapping):
        return value, _expected(annotation, value)
    if typing.is_typeddict(annotation):
        kinds, of_keys = typing.get_type_hints(annotation), Any
        for key in (key for key in value if key not in kinds):
            return value, f"unknown key '{key}'{did_you_mean(key, kinds)} (allowed: {', '.join(kinds)})"
        if missing := annotation.__required_keys__ - value.keys():
            return value, f"needs the keys {', '.join(sorted(missing))}"
    else:
        of_keys, of_items = typing.get_args(annotation) or (Any, Any)
        kinds = dict.fromkeys(value, of_items)
    items = {key: _held(item, kinds[key]) for key, item in value.items()}
    for key, (_, problem) in items.items():
        if problem := mismatch(key, of_keys) or problem:
            return value, f"key '{key}': {problem}"
    return {key: item for key, (item, _) in items.items()}, None


def _expected(annotation: Any, value: Any) -> str:
    given = "null" if value is None else f"{value!r} ({type(value).__name__})"
    return f"expected {describe(annotation)}, got {given}"


def describe(annotation: Any) -> str:
    """An annotation as a person writes it: `int | None`, `list[int]`, 'a' | 'b'."""
    kind, arguments = _kind(annotation), typing.get_args(annotation)
    if kind in (typing.Union, types.UnionType):
        return " | ".join(map(describe, arguments))
    if kind is typing.Literal:
        return " | ".join(map(repr, arguments))
    if annotation is type(None) or annotation is None:
        return "null"
    name = getattr(kind, "__name__", str(kind))
    inner = ", ".join("..." if argument is Ellipsis else describe(argument) for argument in arguments)
    return f"{name}[{inner}]" if arguments else name
