import os
import subprocess
import sys
from pathlib import Path

import pytest
from config_parts import MODEL, problems

from ldm import config

ROOT = Path(__file__).parents[2]


def test_load_values_and_interpolations(write):
    cfg = config.load(write("a: 1e-4\nb: ${a}\nc: {d: [1, two, null], e: '${..b}'}\nf: 'x'\n"))
    expected = {"a": 1e-4, "b": 1e-4, "c": {"d": [1, "two", None], "e": 1e-4}, "f": "x"}
    assert config.to_plain(cfg) == expected
    assert isinstance(cfg.a, float)


def test_duplicate_keys_name_both_lines(write):
    found = problems(config.load, write("a:\n  b: 1\n  c: 2\n  b: 3\nl:\n- x: 1\n  x: 2\n"))
    assert found == [
        "x.yaml:4: a.b: given twice (first on line 2)",
        "x.yaml:7: l.0.x: given twice (first on line 6)",
    ]


def test_same_key_at_different_places_is_no_duplicate(write):
    cfg = config.load(write("a: {x: 1}\nb: {x: 2}\nc: &c {x: 3}\nd:\n  <<: *c\n  y: 4\n"))
    assert config.to_plain(cfg.d) == {"x": 3, "y": 4}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "x.yaml:3: not YAML:"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not YAML:"),
        ("a: !!python/object/apply:os.getcwd []\n", "x.yaml:1: not YAML:"),
        ("", "x.yaml: expected a mapping of sections"),
        ("- 1\n", "x.yaml: expected a mapping of sections"),
        ("hello\n", "x.yaml: expected a mapping of sections"),
        ("a: &a\n  b: *a\n", "x.yaml:"),
        ("a: 1\nb: ${nothing.there}\n", "x.yaml:2: b: Interpolation key 'nothing.there' not found"),
    ],
)
def test_bad_files_name_the_line(write, text, expected):
    (found,) = problems(config.load, write(text))
    assert found.startswith(expected)


def test_broken_interpolations_are_listed_together(write):
    found = problems(config.load, write("a: ${x}\nb:\n- 1\n- c: ${y.z}\nd: ${d}\ne: ${b}\n"))
    assert [line.split(": ")[:2] for line in found[:2]] == [["x.yaml:1", "a"], ["x.yaml:4", "b.1.c"]]
    assert any(line.startswith("x.yaml:5: d:") for line in found)


def test_multiplying_anchors_are_stopped():
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (found,) = problems(config.loads, "\n".join(rows))
    assert "anchors" in found


def test_missing_file_names_the_near_one(write):
    write("a: 1\n", "autoencoder.yaml")
    (found,) = problems(config.load, "autoencodr.yaml")
    assert found == "autoencodr.yaml: no such file; did you mean autoencoder.yaml?"
    (found,) = problems(config.load, "zzz.yaml")
    assert "autoencoder.yaml" in found
    (found,) = problems(config.load, ".")
    assert found == ".: is a folder; . has autoencoder.yaml"


def test_open_values_are_listed_together_in_order(write):
    text = "data:\n  root: ???\n  other: ${data.root}\nfirst: ???\nlist:\n- ???\n"
    found = problems(config.load, write(text))
    assert found == [
        "x.yaml:2: data.root: no value yet; give data.root=VALUE on the command line",
        "x.yaml:4: first: no value yet; give first=VALUE on the command line",
        "x.yaml:6: list.0: no value yet; give list.0=VALUE on the command line",
    ]
    cfg = config.load("x.yaml", ["data.root=/my/images", "first=1", "list.0=2"])
    assert config.to_plain(cfg) == {
        "data": {"root": "/my/images", "other": "/my/images"},
        "first": 1,
        "list": [2],
    }


def test_base_lies_underneath(write):
    Path("sub").mkdir()
    write(
        "a: 1\nb: {c: 2, d: [1, 2, 3]}\nm: {target: ldm.parts.Part, params: {channels: 1, rate: 2}}\n",
        "b.yaml",
    )
    write("base: ../b.yaml\nb: {d: [9]}\nm: {params: {rate: 3}}\n", "sub/mid.yaml")
    cfg = config.load(write("base: sub/mid.yaml\na: 5\nb: {e: 6}\n"), ["b.c=7"])
    assert config.to_plain(cfg) == {
        "a": 5,
        "b": {"c": 7, "d": [9], "e": 6},
        "m": {"target": "ldm.parts.Part", "params": {"channels": 1, "rate": 3}},
    }


def test_another_target_does_not_inherit_params(write):
    write("m: {target: ldm.parts.Part, params: {channels: 1}}\n", "b.yaml")
    cfg = config.load(write("base: b.yaml\nm: {target: ldm.parts.AnyKeyword, params: {needed: 1}}\n"))
    assert config.to_plain(cfg.m) == {"target": "ldm.parts.AnyKeyword", "params": {"needed": 1}}


def test_base_problems(write):
    write("base: x.yaml\n", "b.yaml")
    (found,) = problems(config.load, write("base: b.yaml\n"))
    assert "circle" in found
    (found,) = problems(config.load, write("base: nowhere.yaml\n"))
    assert "nowhere.yaml: no such file" in found
    (found,) = problems(config.load, write("a: 1\nbase: [b.yaml]\n"))
    assert found.startswith("x.yaml:2: base: expected one file name")


def test_a_mistake_in_the_base_is_located_there(write):
    write(MODEL.replace("widths", "width"), "b.yaml")
    (found,) = problems(config.check, config.load(write("base: b.yaml\nname: mine\n")))
    assert found.startswith("b.yaml:8: model.params.width: unknown; did you mean widths?")


def test_loads_refuses_what_lies_outside():
    assert config.to_plain(config.loads("a: {b: 1}\n")) == {"a": {"b": 1}}
    (found,) = problems(config.loads, "x: 1\na: ${oc.env:HOME}\n", "model.safetensors")
    assert found.startswith("model.safetensors:2: a: refers to something outside")
    (found,) = problems(config.loads, "l: [1, '${x}']\n")
    assert "l: refers" in found
    (found,) = problems(config.loads, "base: /etc/hosts\n")
    assert "base: refers" in found


def test_load_needs_no_torch(write):
    write(MODEL)
    code = (
        "import sys, ldm.config as c; c.load('x.yaml', ['model.params.rate=1', 'training.steps=3']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
