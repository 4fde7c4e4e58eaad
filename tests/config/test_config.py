import os
import subprocess
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypedDict

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from omegaconf import OmegaConf

from ldm import config
from ldm.config import ConfigError
from ldm.config.signatures import describe, mismatch, missing_parameters, parameters
from ldm.wording import nearest

ROOT = Path(__file__).parents[2]


class Sizes(TypedDict, total=False):
    width: int
    height: int


class Part:
    """Stands in for a class of ours: `ldm.parts.Part`."""

    def __init__(
        self,
        channels: int,
        rate: float = 0.5,
        name: str = "plain",
        mode: Literal["fast", "exact"] = "fast",
        widths: Sequence[int] = (1, 2),
        inner: Any = None,
        flag: bool = False,
        count: int | Literal["auto"] | None = None,
        sizes: Sizes | None = None,
        untyped=3,
    ):
        if channels < 0:
            raise ValueError("channels must not be negative")
        self.given = dict(channels=channels, rate=rate, name=name, mode=mode, widths=widths, inner=inner)


class AnyKeyword:
    def __init__(self, needed, **options):
        self.options = options


def function(channels: int = 1) -> int:
    return channels


@pytest.fixture(autouse=True)
def parts_module(monkeypatch):
    module = types.ModuleType("ldm.parts")
    module.torch, module.os = torch, os
    for thing in (Part, AnyKeyword, function):
        monkeypatch.setattr(thing, "__module__", "ldm.parts")
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "ldm.parts", module)
    import ldm

    monkeypatch.setattr(ldm, "parts", module, raising=False)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "x.yaml") -> str:
        Path(name).write_text(text)
        return name

    return write


def problems(call, *args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


MODEL = """\
training:
  steps: 100
  lr: 1e-4
model:
  target: ldm.parts.Part
  params:
    channels: 4
    widths: [1, 2]
    inner:
      target: ldm.parts.Part
      params:
        channels: 8
"""


# Loading


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
    assert found == ". is a folder; give one of its files: autoencoder.yaml"


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


# Overrides


@pytest.mark.parametrize(
    "override, path, expected",
    [
        ("training.steps=7", "training.steps", 7),
        ("training.steps=null", "training.steps", None),
        ("training.lr=2e-3", "training.lr", 2e-3),
        ("training.lr='2e-3'", "training.lr", "2e-3"),
        ("training.steps=true", "training.steps", True),
        ("training.steps=a=b", "training.steps", "a=b"),
        ('training.steps=""', "training.steps", ""),
        ("model.params.widths=[3, 4, x]", "model.params.widths", [3, 4, "x"]),
        ("model.params.widths.1=9", "model.params.widths", [1, 9]),
        ("model.params.widths[0]=9", "model.params.widths", [9, 2]),
        ("model.params.inner=null", "model.params.inner", None),
        ("model.params.inner.params.rate=1", "model.params.inner.params.rate", 1),
        ("model.params.inner={a: {b: 1}}", "model.params.inner", {"a": {"b": 1}}),
        ("training.steps=${training.lr}", "training.steps", 1e-4),
        ("training.steps=/my/images", "training.steps", "/my/images"),
    ],
)
def test_override(write, override, path, expected):
    found = OmegaConf.select(config.load(write(MODEL), [override]), path)
    found = config.to_plain(found)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("training.stpes=3", "unknown key 'training.stpes'; did you mean training.steps?"),
        ("trainin.steps=3", "unknown key 'trainin'; did you mean training?"),
        ("steps=3", "unknown key 'steps'; did you mean training.steps?"),
        ("model.channels=3", "unknown key 'model.channels'; did you mean model.params.channels?"),
        ("zzz=3", "unknown key 'zzz' (there are: training, model)"),
        ("training.steps", "no equals sign; write it as a.b.c=value"),
        ("--steps", "no equals sign"),
        ("=3", "no key"),
        ("training.steps=", "no value; write training.steps=null"),
        ("training.steps=[1", "the value is not YAML"),
        ("training.steps.x=1", "training.steps is 100, which holds no key 'x'"),
        ("model.params.widths.2=1", "model.params.widths is a list of 2, which has no item '2'"),
        ("model.params.widths.x=1", "has no item 'x'"),
    ],
)
def test_override_that_fits_nothing(write, override, expected):
    (found,) = problems(config.load, write(MODEL), [override])
    assert found.startswith(f"override '{override}': ") and expected in found


def test_override_problems_come_together(write):
    assert len(problems(config.load, write(MODEL), ["a=1", "training.steps=2", "training.x=3", "b"])) == 3


def test_override_of_a_parameter_is_held_to_the_signature(write):
    cfg = config.load(write(MODEL), ["model.params.rate=0.25", "model.params.nam=x"])
    (found,) = problems(config.check, cfg)
    assert found.startswith("command line: model.params.nam: unknown; did you mean name?")


def test_params_may_be_added_to_a_bare_target(write):
    cfg = config.load(write("model:\n  target: ldm.parts.Part\n"), ["model.params.channels=3"])
    config.check(cfg)
    assert cfg.model.params.channels == 3


@dataclass
class Inner:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])


@dataclass
class Training:
    steps: int
    precision: Literal["auto", "32", "bf16"] = "auto"
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    out: Path | None = None
    share: float = 0.5

    def __post_init__(self):
        if self.steps <= 0:
            raise ValueError(f"steps must be positive, got {self.steps}")


@dataclass
class Whole:
    training: Training
    name: str = "run"
    notes: dict = field(default_factory=dict)


def test_fields_of_declared_sections_may_be_overridden(write):
    path = write("training:\n  steps: 3\n")
    overrides = ["training.precision=bf16", "training.inner.lr=5e-4", "name=x"]
    for sections in ({"": Whole}, {"": Whole, "training": Training, "training.inner": Inner}):
        cfg = config.load(path, overrides, sections=sections)
        run = config.check_section(cfg, Whole)
        assert (run.training.precision, run.training.inner.lr, run.name) == ("bf16", 5e-4, "x")
    (found,) = problems(config.load, path, ["training.precison=1"], sections={"training": Training})
    assert "did you mean training.precision?" in found
    (found,) = problems(config.load, path, ["training.inner.lrr=1"], sections={"training": Training})
    assert "did you mean training.inner.lr?" in found


# Checking


def test_a_right_config_passes(write):
    config.check(config.load(write(MODEL)))


def test_every_mistake_is_reported_at_once_with_its_line(write):
    text = """\
a:
  target: ldm.parts.Part
  params:
    chanels: 4
    rate: fast
    widths: [1, x]
    mode: exakt
    inner:
      target: ldm.parts.Prt
    flag: 1
b:
  target: ldm.parts.Part
  channels: 3
  params: {channels: '3'}
c:
  - params: {x: 1}
  - target: ldm.prts.Part
d:
  target: ldm.parts.Part
  params: 3
e:
  target: 3
"""
    assert problems(config.check, config.load(write(text))) == [
        "x.yaml:4: a.params.chanels: unknown; did you mean channels? (ldm.parts.Part takes: channels, rate, "
        "name, mode, widths, inner, flag, count, sizes, untyped)",
        "x.yaml:5: a.params.rate: expected float, got 'fast' (str)",
        "x.yaml:6: a.params.widths: item 1: expected int, got 'x' (str)",
        "x.yaml:7: a.params.mode: must be one of 'fast', 'exact', got 'exakt'; did you mean exact?",
        "x.yaml:10: a.params.flag: expected bool, got 1 (int)",
        "x.yaml:3: a.params: ldm.parts.Part also needs channels",
        "x.yaml:9: a.params.inner.target: ldm.parts has no 'Prt'; did you mean ldm.parts.Part?",
        "x.yaml:13: b.channels: stands beside target; move it under params",
        "x.yaml:14: b.params.channels: expected int, got '3' (str)",
        "x.yaml:16: c.0.params: params without a target beside it",
        "x.yaml:17: c.1.target: ldm has no 'prts'; did you mean ldm.parts?",
        "x.yaml:20: d.params: expected a mapping of parameters, got 3",
        "x.yaml:22: e.target: expected a dotted path, got 3",
    ]


def test_a_part_of_a_config_is_checked_under_its_full_path(write):
    cfg = config.load(write(MODEL), ["model.params.inner.params.channels=x"])
    (found,) = problems(config.check, cfg.model.params)
    assert found == "command line: model.params.inner.params.channels: expected int, got 'x' (str)"


def test_plain_mappings_are_checked_without_lines():
    (found,) = problems(config.check, {"m": {"target": "ldm.parts.Part"}})
    assert found == "m.params: ldm.parts.Part also needs channels"


def test_parameters_from_the_program():
    tree = {"m": {"target": "ldm.parts.Part", "params": {"rate": 1}}}
    config.check(tree, provided={"m": ["channels"]})
    tree["m"]["params"]["channels"] = 3
    (found,) = problems(config.check, tree, provided={"m": ["channels"]})
    assert "comes from the program" in found


def test_any_keyword_signatures_accept_anything_but_still_need():
    config.check({"target": "ldm.parts.AnyKeyword", "params": {"needed": 1, "x": 2}})
    (found,) = problems(config.check, {"target": "ldm.parts.AnyKeyword", "params": {"x": 2}})
    assert "also needs needed" in found


def test_real_target_and_nearest_module():
    config.check({"target": "ldm.diffusion.schedule.FlowSchedule"})
    (found,) = problems(config.check, {"target": "ldm.diffusion.schedul.FlowSchedule"})
    assert "did you mean ldm.diffusion.schedule?" in found


FOREIGN = """
import sys, pathlib
pathlib.Path({marker!r}).write_text('imported')
def make(**k): return k
"""


@pytest.mark.parametrize("call", [config.check, config.instantiate])
def test_foreign_modules_are_not_even_imported(call, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "sentinel_module.py").write_text(FOREIGN.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sentinel_module", raising=False)
    tree = {"target": "sentinel_module.make", "params": {"a": 1}}
    (found,) = problems(call, tree)
    assert "outside ldm" in found
    assert not marker.exists() and "sentinel_module" not in sys.modules
    call(tree, allow_foreign=True)
    assert marker.exists()
    assert config.instantiate(tree, allow_foreign=True) == {"a": 1}


@pytest.mark.parametrize(
    "target",
    [
        "ldm.config.os.system",
        "ldm.parts.os.system",
        "ldm.parts.torch.load",
        "ldm.parts.torch.nn.Identity",
        "ldm.config.tree.yaml.unsafe_load",
        "ldm.parts.Part.__init__.__globals__",
        "ldm.parts.Part.__subclasses__",
        "ldm.parts.function",
        "ldm.config.tree.save",
        "ldm.config.ConfigError",
        "ldm.config.signatures.resolve_target",
        "ldm.parts",
        "ldm",
        "",
        "os.system",
        "ldm..parts.Part",
        "ldm.parts.Part()",
    ],
)
def test_paths_that_must_not_be_called(target):
    (found,) = problems(config.check, {"a": {"target": target}})
    assert found.startswith("a.target: ")
    problems(config.instantiate, {"target": target})


def test_foreign_paths_inside_ldm_stay_refused_for_a_users_yaml():
    (found,) = problems(config.check, {"a": {"target": "ldm.parts.os.system"}}, allow_foreign=True)
    assert "ldm.parts.os is not a part of ldm" in found


def test_foreign_targets_must_be_callable_and_exist():
    config.check({"a": {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 2}}}, True)
    (found,) = problems(config.check, {"target": "torch.nn.Linear", "params": {"in_feature": 1}}, True)[:1]
    assert "did you mean in_features?" in found
    (found,) = problems(config.check, {"target": "torch.nn.Lineer"}, True)
    assert "did you mean torch.nn.Linear?" in found
    (found,) = problems(config.check, {"target": "os.sep"}, True)
    assert "cannot be called" in found
    (found,) = problems(config.check, {"target": "no_such_module_here.X"}, True)
    assert "cannot import no_such_module_here" in found


# Values against annotations


class Thing:
    pass


FITS = [
    (3, int),
    (3, float),
    (3.5, float),
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
    (3.0, int, "expected int, got 3.0 (float)"),
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
    assert nearest("Kl_weight", ["kl_weight", "k"]) == "kl_weight"
    assert nearest("zzz", ["kl_weight"]) is None


# Sections


def test_section_fills_the_dataclass(write):
    text = "training:\n  steps: 5\n  inner: {betas: [0.5, 0.9]}\n  other:\n    lr: 1\n  precision: 32\n"
    found = config.check_section(config.load(write(text)).training, Training, "training")
    assert found == Training(5, "32", Inner(betas=[0.5, 0.9]), Inner(lr=1))
    assert config.check_section(None, Inner, "training.inner") == Inner()
    assert config.check_section({"steps": 1, "inner": None, "other": None}, Training).inner == Inner()


def test_section_reports_everything(write):
    text = "training:\n  stpes: 5\n  share: half\n  inner:\n    lrr: 1\n    betas: [x]\n  other: 3\n"
    cfg = config.load(write(text))
    assert problems(config.check_section, cfg.training, Training, "training") == [
        "x.yaml:2: training.stpes: unknown; did you mean training.steps? "
        "(allowed: steps, precision, inner, other, out, share)",
        "x.yaml:3: training.share: expected float, got 'half' (str)",
        "x.yaml:5: training.inner.lrr: unknown; did you mean training.inner.lr? (allowed: lr, betas)",
        "x.yaml:6: training.inner.betas: item 0: expected float, got 'x' (str)",
        "x.yaml:7: training.other: expected a mapping of lr, betas, got 3",
        "x.yaml:1: training: also needs steps",
    ]


def test_section_refused_by_its_dataclass(write):
    cfg = config.load(write("a: 1\ntraining:\n  steps: 0\n"))
    (found,) = problems(config.check_section, cfg.training, Training, "training")
    assert found == "x.yaml:2: training: steps must be positive, got 0"
    assert problems(config.check_section, 3, Training, "training")


# Building


def test_instantiate_builds_inside_out(write):
    text = MODEL + "      \n    name: deep\nplain:\n- target: ldm.parts.Part\n  params: {channels: 1}\n"
    cfg = config.load(write(text))
    built = config.instantiate(cfg.model, rate=2.0)
    assert built.given["rate"] == 2.0 and built.given["name"] == "deep"
    assert isinstance(built.given["inner"], Part) and built.given["inner"].given["rate"] == 0.5
    assert type(built.given["widths"]) is list
    inner = [{"a": {"target": "ldm.parts.Part", "params": {"channels": 2}}}, {"b": [1]}]
    built = config.instantiate({"target": "ldm.parts.Part", "params": {"channels": 1, "inner": inner}})
    assert isinstance(built.given["inner"][0]["a"], Part) and built.given["inner"][1] == {"b": [1]}
    assert isinstance(inner[0]["a"], dict), "the configuration itself must not change"


def test_constructor_errors_name_their_place(write):
    cfg = config.load(write(MODEL), ["model.params.inner.params.channels=-1"])
    (found,) = problems(config.instantiate, cfg.model)
    assert found.startswith("x.yaml:9: model.params.inner (ldm.parts.Part): channels must not be negative")
    with pytest.raises(ConfigError) as caught:
        config.instantiate(cfg.model)
    assert type(caught.value.__cause__) is ValueError


def test_instantiate_refuses_what_is_no_part():
    for nothing in (None, 3, {}, {"params": {}}, [{"target": "ldm.parts.Part"}]):
        problems(config.instantiate, nothing)
    (found,) = problems(
        config.instantiate, {"target": "ldm.parts.Part", "params": {"channels": 1}}, channels=2
    )
    assert "channels comes from the program" in found


# Writing and comparing


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
