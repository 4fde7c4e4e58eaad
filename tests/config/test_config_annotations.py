import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import hypothesis.strategies as st
import pytest
import torch
from config_parts import AnyKeyword, Part, Sizes, function
from hypothesis import given, settings

from ldm.config.annotations import describe, fitted, mismatch
from ldm.config.signatures import missing_parameters, parameters

ROOT = Path(__file__).parents[2]


class Thing:
    pass


FITS = [
    (3, int),
    (3, float),
    (3.5, float),
    (1e3, int),
    ([1e3, 2], Sequence[int] | None),
    (True, bool),
    ("a", str),
    ("a/b", Path),
    (None, None),
    (None, int | None),
    (None, Optional[int]),  # noqa: UP045 (written the old way on purpose)
    ([1, 2], list[int]),
    ([1, 2], Sequence[int]),
    ([1, 2], tuple[int, ...]),
    ([1, "a"], tuple[int, str]),
    ([[1], [2]], list[list[int]]),
    ([], list),
    ({"a": 1}, dict),
    ({"a": 1}, dict[str, int]),
    ({"width": 1}, Sizes),
    ("a", Literal["a", "b"]),
    ("auto", int | Literal["auto"]),
    (3, int | Literal["auto"]),
    (3, int | Sequence[int]),
    ([3], int | Sequence[int]),
    (3, Annotated[int, "more"]),
    ("cuda", torch.device),
    ("anything", Any),
    (3, Thing),
    ({"target": "ldm.parts.Part"}, int),
    ([{"target": "ldm.parts.Part"}], list[int]),
    (3, "NotResolved"),
    (1, typing.TypeVar("T")),
]
FAILS = [
    ("abc", int, "expected int, got 'abc' (str)"),
    (3.5, int, "expected int, got 3.5 (float)"),
    (float("inf"), int, "expected int, got inf (float)"),
    ([1.0, 2.5], list[int], "item 1: expected int, got 2.5 (float)"),
    (True, int, "expected int, got True (bool)"),
    (False, float, "expected float, got False (bool)"),
    ("1e-4", float, "expected float, got '1e-4' (str)"),
    (1, bool, "expected bool, got 1 (int)"),
    (2024, str, "expected str, got 2024 (int)"),
    (3, Path, "expected Path, got 3 (int)"),
    (None, int, "expected int, got null"),
    ("x", int | None, "expected int | null, got 'x' (str)"),
    ("ab", list[str], "expected list[str], got 'ab' (str)"),
    ("ab", Sequence[str], "expected Sequence[str], got 'ab' (str)"),
    (3, Sequence[int], "expected Sequence[int], got 3 (int)"),
    ([1, "x"], list[int], "item 1: expected int, got 'x' (str)"),
    ([1, "x"], int | list[int], "item 1: expected int, got 'x' (str)"),
    ([1], tuple[int, int], "expected 2 values (tuple[int, int]), got 1"),
    ([1], dict, "expected dict, got [1] (list)"),
    ({"a": "x"}, dict[str, int], "key 'a': expected int, got 'x' (str)"),
    ({"widht": 1}, Sizes, "unknown key 'widht'; did you mean width? (allowed: width, height)"),
    ({"width": "1"}, Sizes | None, "key 'width': expected int, got '1' (str)"),
    ("c", Literal["a", "b"], "must be one of 'a', 'b', got 'c'"),
    (1, Literal[True], "must be one of True, got 1"),
    ("atuo", int | Literal["auto"], "expected int | 'auto', got 'atuo' (str); did you mean auto?"),
]


@pytest.mark.parametrize("value, annotation", FITS)
def test_value_that_fits(value, annotation):
    assert mismatch(value, annotation) is None


@pytest.mark.parametrize("value, annotation, expected", FAILS)
def test_value_that_does_not_fit(value, annotation, expected):
    assert mismatch(value, annotation) == expected


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
ANNOTATIONS = st.recursive(
    st.sampled_from([int, float, str, bool, None, list, dict, Literal["a", 1], Sizes, Path]),
    lambda inner: inner.map(lambda a: list[a]) | st.tuples(inner, inner).map(lambda ab: typing.Union[ab]),  # noqa: UP007
    max_leaves=4,
)


@settings(deadline=None, max_examples=100)
@given(PLAIN, ANNOTATIONS, ANNOTATIONS)
def test_a_union_fits_what_one_of_its_choices_fits(value, first, second):
    either = typing.Union[first, second]  # noqa: UP007
    fits = mismatch(value, first) is None or mismatch(value, second) is None
    assert (mismatch(value, either) is None) == fits
    assert describe(either)


def test_parameters_of_callables():
    assert parameters(AnyKeyword) is None
    assert list(parameters(function)) == ["channels"]
    assert missing_parameters(Part, {"rate"}) == ["channels"]


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        (1e3, int, 1000),
        (1e3, int | None, 1000),
        (1e3, Annotated[int, "more"], 1000),
        (1e3, float, 1000.0),
        (1e3, int | float, 1000.0),
        (1e3, Any, 1000.0),
        (3.5, int, 3.5),
        (True, int, True),
        ([1e3, 2], Sequence[int], [1000, 2]),
        ([1e3, 2.0], tuple[int, float], [1000, 2.0]),
        ([1e3, 2.0, 3.0], tuple[int, int], [1e3, 2.0, 3.0]),
        ({"a": 1e3}, dict[str, int], {"a": 1000}),
        ({"width": 1e3}, Sizes | None, {"width": 1000}),
        (
            {"target": "ldm.parts.Part", "params": 1e3},
            dict[str, int],
            {"target": "ldm.parts.Part", "params": 1e3},
        ),
        (32, Literal["auto", "32"], "32"),
        (32, int | Literal[32, "32"], 32),
    ],
)
def test_values_as_their_annotation_wants_them(value, annotation, expected):
    found = fitted(value, annotation)
    assert repr(found) == repr(expected)
    assert mismatch(found, annotation) == mismatch(expected, annotation)


@settings(deadline=None, max_examples=100)
@given(PLAIN, ANNOTATIONS)
def test_fitting_changes_no_value_and_makes_none_unfit(value, annotation):
    found = fitted(value, annotation)
    assert mismatch(value, annotation) is not None or mismatch(found, annotation) is None
    assert found == value
