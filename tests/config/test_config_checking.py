import sys
from pathlib import Path

import pytest
from config_parts import MODEL, Inner, Part, Training, problems

from ldm import config
from ldm.config import ConfigError

ROOT = Path(__file__).parents[2]


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


OPEN = """\
conditioner:
  target: ldm.parts.AnyKeyword
  params:
    needed: 1
    inner:
    - target: ldm.parts.Part
      params: {rate: 0.25}
    - target: ldm.parts.Part
      params: {channels: auto}
    - target: ldm.parts.Part
      params: {channels: 7}
    - target: ldm.parts.Part
"""
OFFERED = {"conditioner*": ["channels", "rate"]}


def test_parameters_that_the_program_offers(write):
    cfg = config.load(write(OPEN))
    assert len(problems(config.check, cfg)) == 3
    config.check(cfg, offered=OFFERED)
    config.fill(cfg, "conditioner", "channels", lambda: 1 / 0)  # no part there leaves it open
    config.fill(cfg, "conditioner*", "rate", lambda: 1 / 0)  # its class has a default of its own
    config.fill(cfg, "conditioner*", "channels", lambda: 5)
    assert [part.params.channels for part in cfg.conditioner.params.inner] == [5, 5, 7, 5]
    assert cfg.conditioner.params.inner[0].params.rate == 0.25
    config.check(cfg)
    assert list(cfg.conditioner.params) == ["needed", "inner"], "any keyword is not every keyword"
    assert config.instantiate(cfg.conditioner).options["inner"][3].given["channels"] == 5
    assert config.differences(config.loads(config.to_yaml(cfg)), cfg) == []


def test_nested_parts_are_all_filled(write):
    nested = {"target": "ldm.parts.Part", "params": {"inner": {"target": "ldm.parts.Part"}}}
    for tree in ({"m": nested}, config.loads(config.to_yaml({"m": nested}))):
        config.fill(tree, "m*", "channels", lambda: 5)
        built = config.instantiate(tree["m"])
        assert built.given["channels"] == built.given["inner"].given["channels"] == 5


def test_other_values_for_what_is_offered_are_held_to_the_signature(write):
    text = OPEN.replace("rate: 0.25", "rate: auto, name: auto, chanels: auto").replace(
        "channels: 7", "channels: seven"
    )
    cfg = config.load(write(text))
    assert problems(config.check, cfg, offered=OFFERED) == [
        "x.yaml:7: conditioner.params.inner.0.params.chanels: unknown; did you mean channels? "
        "(ldm.parts.Part takes: channels, rate, name, mode, widths, inner, flag, count, sizes, untyped)",
        "x.yaml:11: conditioner.params.inner.2.params.channels: expected int, got 'seven' (str)",
    ]
    (found, *_) = problems(config.check, cfg, offered={"conditioner": ["channels", "rate"]})
    assert found.startswith("x.yaml:7: conditioner.params.inner.0.params.rate: expected float, got 'auto'")


def test_a_value_that_does_not_fit_is_refused_at_its_place(write):
    cfg = config.load(write(OPEN))
    (found,) = problems(config.fill, cfg, "conditioner.params.inner.1", "channels", lambda: "many")
    assert found == "x.yaml:9: conditioner.params.inner.1.params.channels: expected int, got 'many' (str)"
    assert cfg.conditioner.params.inner[1].params.channels == "auto"
    cfg = config.load(write(OPEN.replace("ldm.parts.AnyKeyword", "torch.nn.Identity")))
    (found,) = problems(config.fill, cfg, "conditioner*", "channels", lambda: 5)
    assert found.startswith("x.yaml:2: conditioner.target: target 'torch.nn.Identity' is outside ldm")
    config.fill(cfg, "conditioner*", "channels", lambda: 5, allow_foreign=True)


def test_what_is_provided_is_found_by_pattern_too():
    tree = {"l": [{"target": "ldm.parts.Part"}, {"target": "ldm.parts.Part", "params": {"channels": 3}}]}
    (found,) = problems(config.check, tree, provided={"l.*": ["channels"]})
    assert found == "l.1.params.channels: comes from the program and cannot be set here"


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
        "ldm.config.yaml_files.yaml.unsafe_load",
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


def test_whole_numbers_may_be_written_as_floats(write):
    cfg = config.load(write(MODEL), ["model.params.channels=1e3", "training.steps=1e3", "training.lr=null"])
    config.check(cfg)
    built = config.instantiate(cfg.model)
    assert repr(built.given["channels"]) == "1000"
    assert repr(config.check_section({"steps": cfg.training.steps}, Training).steps) == "1000"
    (found,) = problems(config.check_section, {"steps": 2.5}, Training, "training")
    assert found == "training.steps: expected int, got 2.5 (float)"


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
