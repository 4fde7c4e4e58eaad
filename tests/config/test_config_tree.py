import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
from config_parts import MODEL
from hypothesis import given, settings

from ldm import config

ROOT = Path(__file__).parents[2]


def test_save_and_load_agree(write, tmp_path):
    cfg = config.load(
        write(MODEL + "more: {a: '${training.lr}', s: '1e-4', n: null, e: [], b: 'yes', u: ä}\n")
    )
    config.save(cfg, "out.yaml")
    again = config.load("out.yaml")
    assert config.to_plain(again) == config.to_plain(cfg)
    assert "${" not in Path("out.yaml").read_text()
    assert config.differences(cfg, again) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.yaml", "x.yaml"]


def test_a_failed_save_leaves_the_old_file(write, tmp_path, monkeypatch):
    path = write("a: 1\n")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        config.save({"a": 2}, path)
    assert Path(path).read_text() == "a: 1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.yaml"]


def test_differences():
    before = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "l": [{"x": 1}], "f": float("nan"), "g": 1}
    after = {"a": 1.0, "b": {"c": [1, 3], "e": None}, "l": [{"x": 2}], "f": float("nan"), "g": True}
    assert config.differences(before, after) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d: 'x' -> (absent)",
        "l.0.x: 1 -> 2",
        "g: 1 -> True",
        "b.e: (absent) -> None",
    ]


KEYS = st.text("abcdefgh", min_size=1, max_size=3)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-9, 9)
        | st.floats(allow_nan=False)
        | st.text("ab 1e-.'\":#", max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, min_size=1, max_size=3),
        max_leaves=8,
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(TREES, TREES)
def test_yaml_round_trip_and_differences_law(first, second):
    again = config.to_plain(config.loads(config.to_yaml(first)))
    assert repr(again) == repr(first)
    assert config.differences(first, again) == []
    assert bool(config.differences(first, second)) == bool(config.differences(second, first))
    assert bool(config.differences(first, second)) or first == second
