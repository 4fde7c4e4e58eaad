"""The toolkit's own files: what they hold comes back, and nothing else is ever run or believed."""

import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    FIRST_STAGE,
    FLOW,
    class_embedder,
    description,
    first_stage_description,
    randomized,
    save_run,
)
from tiny_runs import save_described as save

import ldm
from ldm.checkpoints import CheckpointError, native
from ldm.checkpoints.strict import KeyMismatch
from ldm.config import ConfigError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL
from ldm.weights.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "pets", description(), checkpoint=True)


def equal(a, b) -> bool:
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What comes back


def test_model_comes_back(run):
    model = ldm.load(run)
    assert isinstance(model, LatentDiffusion)
    assert not model.training
    assert equal(model, load_file(run / "model.safetensors"))
    assert model.description == description()
    assert equal(model, ldm.load(run / "model.safetensors"))
    assert equal(model, ldm.load(str(run)))


def test_checkpoint_holds_raw_and_averaged_weights(run):
    checkpoint = run / "checkpoints" / "step-00000002.ckpt"
    averaged, raw = ldm.load(checkpoint), ldm.load(checkpoint, ema=False)
    assert averaged.description["weights"] == "ema"
    assert raw.description["weights"] == "raw"
    assert raw.description["step"] == 2
    assert equal(averaged, ldm.load(run))
    assert equal(raw, ldm.load(run, ema=False))
    assert not equal(raw, averaged)


def test_raw_weights_that_are_not_there(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"averaged \(EMA\).*raw ones are in .*step-00000002\.ckpt$"):
        ldm.load(run / "model.safetensors", ema=False)
    alone = save_run(tmp_path / "alone", description())
    with pytest.raises(CheckpointError, match="averaged"):
        ldm.load(alone, ema=False)
    with pytest.raises(CheckpointError, match="in the run's checkpoints/"):
        ldm.load(alone / "model.safetensors", ema=False)


def test_a_run_without_averaging_has_raw_weights_only(tmp_path):
    folder = save_run(tmp_path / "raw", description(weights="raw"))
    assert equal(ldm.load(folder), ldm.load(folder, ema=False))
    assert equal(ldm.load(folder), ldm.load(folder / "model.safetensors", ema=False))


def test_newest_checkpoint_is_taken(run, tmp_path):
    folder = tmp_path / "pets"
    (folder / "checkpoints").mkdir(parents=True)
    state = native.read_training(run / "checkpoints" / "step-00000002.ckpt")
    for step in (9, 100, 20):
        native.save_training(folder / "checkpoints" / f"step-{step:08d}.ckpt", {**state, "step": step})
    assert ldm.load(folder).description["step"] == 100


def test_first_stage(tmp_path):
    folder = save_run(tmp_path / "ae", first_stage_description())
    model = ldm.load(folder, dtype=torch.float64)
    assert isinstance(model, AutoencoderKL)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_same_content_same_bytes(run, tmp_path):
    again = ldm.load(run)
    native.save_model(tmp_path / "model.safetensors", again.state_dict(), again.description)
    assert (tmp_path / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_fingerprint_follows_every_value():
    tensors = {"a": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(1)}
    whole = native.fingerprint(tensors)
    assert whole == native.fingerprint(dict(reversed(tensors.items())))
    for change in (
        {"a": torch.tensor([0, 0, 1e-30])},
        {"b": torch.ones(4, dtype=torch.bfloat16)},
        {"d": torch.ones(1)},
    ):
        assert native.fingerprint({**tensors, **change}) != whole


# Nothing else is run


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A module that would leave a trace if anything imported it."""
    (tmp_path / "planted_sentinel_module.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "class Model:\n    def __init__(self, **k): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "imported"
    assert "planted_sentinel_module" not in sys.modules
    assert not (tmp_path / "imported").exists()


def nested(target: str) -> dict:
    """The target in each place of a description where one may stand."""
    whole = description()
    whole["model"]["params"]["conditioner"]["params"]["embedders"].append({"target": target, "params": {}})
    return whole


FOREIGN = [
    "planted_sentinel_module.Model",
    "os.system",
    "builtins.eval",
    "ldm.config.os.system",
    "torch.hub.load",
    "__main__.x",
]


@pytest.mark.parametrize("target", FOREIGN)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_foreign_targets_are_refused_and_not_imported(target, kind, sentinel, tmp_path, run):
    for described in ({**description(), "model": {"target": target, "params": {}}}, nested(target)):
        if kind == "safetensors":
            path = save(tmp_path / "model.safetensors", described)
        else:
            path = tmp_path / "step.ckpt"
            state = native.read_training(run / "checkpoints" / "step-00000002.ckpt")
            native.save_training(path, {**state, "description": described})
        with pytest.raises(ValueError, match="outside ldm|no part of a model|is not a dotted path"):
            ldm.load(path)


@pytest.mark.parametrize(
    "target",
    ["ldm.data.ImageFolder", "ldm.losses.LPIPS", "ldm.training.method.Method", "ldm.sampling.Sampling"],
)
def test_only_parts_of_models_are_built(target, tmp_path):
    path = save(tmp_path / "model.safetensors", nested(target))
    with pytest.raises(CheckpointError, match=f"asks for {target}, which is no part of a model"):
        ldm.load(path)


def test_parts_hidden_in_tuples_are_found_too(run, tmp_path):
    """A pickle has tuples, which a description in JSON has not."""
    described = nested("ldm.data.ImageFolder")
    embedders = described["model"]["params"]["conditioner"]["params"]
    embedders["embedders"] = (*embedders["embedders"],)
    state = native.read_training(run / "checkpoints" / "step-00000002.ckpt")
    native.save_training(tmp_path / "step-00000002.ckpt", {**state, "description": described})
    with pytest.raises(CheckpointError, match="asks for ldm.data.ImageFolder, which is no part of a model"):
        ldm.load(tmp_path / "step-00000002.ckpt")


def test_environment_and_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "32")
    described = description()
    described["model"]["params"]["network"]["params"]["model_channels"] = "${oc.env:SECRET}"
    with pytest.raises(ConfigError, match="outside the text"):
        ldm.load(save(tmp_path / "model.safetensors", described))


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_run_code(tmp_path, zipped):
    trace, path = tmp_path / "trace", tmp_path / "step-00000001.ckpt"
    bad = {"format": native.FORMAT, "model": {"w": torch.zeros(1)}, "description": Runs(trace)}
    if zipped:
        torch.save(bad, path)
    else:
        path.write_bytes(pickle.dumps(bad))
    with pytest.raises(CheckpointError) as caught:
        ldm.load(path)
    assert not trace.exists()
    assert str(path) in str(caught.value)
    if zipped:
        assert isinstance(caught.value, UnsafeCheckpoint)
        assert "open" in caught.value.global_name


# Nothing else is believed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("latent_scale"), "1 missing from the file:\n    latent_scale"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 in the file, but unknown to the module:\n    extra"),
        (lambda t: t.update(latent_scale=torch.zeros(4, 1, 1)), r"latent_scale is \(4, 1, 1\) in the file"),
        (lambda t: t.update(latent_scale=torch.ones(3, 1, 1).long()), "of another type"),
        (lambda t: t.update(latent_scale=torch.full((3, 1, 1), float("nan"))), "NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit(run, tmp_path, change, message):
    tensors = load_file(run / "model.safetensors")
    change(tensors)
    path = tmp_path / "model.safetensors"
    native.save_model(path, tensors, description())
    with pytest.raises(CheckpointError, match=message) as caught:
        ldm.load(path)
    assert str(path) in str(caught.value)


def test_renamed_keys_are_listed(run, tmp_path):
    tensors = {f"module.{name}": value for name, value in load_file(run / "model.safetensors").items()}
    native.save_model(tmp_path / "model.safetensors", tensors, description())
    with pytest.raises(KeyMismatch, match="strip that prefix|'module.' inside") as caught:
        ldm.load(tmp_path / "model.safetensors")
    assert len(caught.value.missing) == len(caught.value.extra) == len(tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/step-00000002.ckpt"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_files_are_named(run, tmp_path, name, share):
    whole = (run / name).read_bytes()
    path = tmp_path / (run / name).name
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError) as caught:
        ldm.load(path)
    assert str(path) in str(caught.value)
    if path.suffix == ".ckpt":  # a run then resumes from the one before
        assert isinstance(caught.value, CorruptCheckpoint)


def test_garbage_is_a_damaged_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    path.write_bytes(b"\x07garbage" * 99)
    with pytest.raises(CorruptCheckpoint):
        native.read_training(path)


def test_a_newer_format_is_named(run, tmp_path):
    path = save(tmp_path / "model.safetensors", description(format="ldm/2"))
    with pytest.raises(UnsupportedCheckpoint, match=r"ldm/2.*newer version.*upgrade.*reads ldm/1"):
        ldm.load(path)
    state = native.read_training(run / "checkpoints" / "step-00000002.ckpt")
    native.save_training(tmp_path / "step.ckpt", {"format": "ldm/12", "step": state["step"]})
    with pytest.raises(UnsupportedCheckpoint, match="newer version"):
        ldm.load(tmp_path / "step.ckpt")
    with pytest.raises(UnsupportedCheckpoint, match="has format 'sdxl'"):
        ldm.load(save(tmp_path / "other.safetensors", description(format="sdxl")))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ([1], "by a list"),
        ({"format": "ldm/1"}, "'model'.*null"),
        (description(classes="cat"), "'classes'.*'cat'"),
        (description(classes=[1]), "'classes'.*1"),
        (description(sampling=[]), "'sampling'.*list"),
        (description(weights=1), "'weights'.*1"),
        (
            {**description(), "model": {"target": "ldm.models.unet.UNetModle"}},
            "did you mean ldm.models.unet.UNetModel",
        ),
        ({**description(), "model": {**FIRST_STAGE, "params": {"embed_dmi": 3}}}, "did you mean embed_dim"),
        ({**description(), "model": FLOW}, "describes a Denoiser, which is no model"),
        ({**description(), "model": {}}, "expected a mapping with a target"),
    ],
    ids=str,
)
def test_descriptions_that_make_no_sense(tmp_path, described, message):
    path = save(tmp_path / "model.safetensors", described)
    with pytest.raises(ValueError, match=message) as caught:
        ldm.load(path)
    assert str(path) in str(caught.value)


def test_other_peoples_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(CheckpointError, match="no description"):
        ldm.load(tmp_path / "theirs.safetensors")
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "theirs.ckpt")
    with pytest.raises(CheckpointError, match="no training checkpoint of this toolkit"):
        ldm.load(tmp_path / "theirs.ckpt")
    (tmp_path / "config.yaml").write_text("task: diffusion\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml: .*no file of torch\.save"):
        ldm.load(tmp_path / "config.yaml")


def test_a_checkpoint_that_lacks_parts(tmp_path):
    torch.save({"format": native.FORMAT, "model": {}}, tmp_path / "step.ckpt")
    with pytest.raises(CheckpointError, match="without description, ema, step"):
        ldm.load(tmp_path / "step.ckpt")


# Paths


def test_wrong_paths_say_what_is_near(run, monkeypatch):
    runs = run.parent
    (runs / "dogs").mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match=f"Did you mean {run}"):
        ldm.load(runs / "pest")
    with pytest.raises(FileNotFoundError, match="has dogs, pets"):
        ldm.load(runs / "xyzzy" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=f"Did you mean {run / 'model.safetensors'}"):
        ldm.load(run / "model.safetensor")
    with pytest.raises(CheckpointError, match="holds these: pets"):
        ldm.load(runs)
    with pytest.raises(CheckpointError, match=f"give {run}, or a file"):
        ldm.load(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no model.safetensors and no checkpoints/, but nothing"):
        ldm.load(runs / "dogs")
    monkeypatch.chdir(runs)
    with pytest.raises(FileNotFoundError, match=r"Did you mean pets\?"):
        ldm.load("pest")


def test_an_untrained_run(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="train it first"):
        ldm.load(tmp_path / "run")


def test_writing_leaves_the_previous_file(run, tmp_path):
    path = tmp_path / "model.safetensors"
    native.save_model(path, {"w": torch.zeros(1)}, description())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot be"):
        native.save_model(path, {"w": torch.zeros(1, device="meta")}, description())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert json.loads(json.dumps(native.read_description(path))) == description()


def test_a_class_table_of_another_size(run, tmp_path):
    """The commonest mistake: the same network for another number of classes."""
    described = description()
    described["model"]["params"]["conditioner"]["params"]["embedders"] = [class_embedder(num_classes=7)]
    native.save_model(tmp_path / "model.safetensors", load_file(run / "model.safetensors"), described)
    with pytest.raises(
        KeyMismatch, match=r"embedding.weight is \(4, 8\) in the file, \(8, 8\) in the module"
    ):
        ldm.load(tmp_path / "model.safetensors")


def test_random_models_differ_by_seed():
    a, b = (randomized(native.build(first_stage_description(), "a test"), seed) for seed in (0, 1))
    assert not equal(a, b)


def test_only_files_of_other_projects_are_sent_for_a_config(run, tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "theirs.ckpt")
    with pytest.raises(CheckpointError, match="needs that project's config"):
        ldm.load(tmp_path / "theirs.ckpt")
    whole = (run / "checkpoints" / "step-00000002.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptCheckpoint) as caught:
        ldm.load(tmp_path / "cut.ckpt")
    assert "project" not in str(caught.value)
