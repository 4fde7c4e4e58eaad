from pathlib import Path

import pytest
from config_parts import MODEL, Inner, Training, Whole, problems
from omegaconf import OmegaConf

from ldm import config

ROOT = Path(__file__).parents[2]


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
