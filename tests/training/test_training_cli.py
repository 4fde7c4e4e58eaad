"""`python train.py`: what it prints, what it refuses at once, and what it leaves behind."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_runs as T
import yaml
from PIL import Image

from ldm.checkpoints import native
from ldm.training.run_config import complete_yaml, load_run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    images, runs = T.write_images(place / "images"), place / "runs"
    T.write_config(place / "ae.yaml", T.autoencoder_config(images, runs))
    T.write_config(place / "ldm.yaml", T.diffusion_config(images, runs, runs / "ae"))
    return place


@pytest.fixture(scope="module")
def trained(place) -> str:
    """A first stage in `runs/ae`; what the command said."""
    return T.finish(
        place / "ae.yaml",
        "training.steps=4",
        "logging.progress=true",
        "logging.validate_every=2",
        log=place / "ae.log",
    )


def refused(place: Path, config: str, *overrides: str) -> str:
    """The one message of a command that fails at once, before a run folder is made."""
    before = sorted((place / "runs").iterdir()) if (place / "runs").exists() else []
    said = T.finish(place / config, "name=refused", *overrides, log=place / "log", code=1)
    assert sorted((place / "runs").iterdir() if (place / "runs").exists() else []) == before
    assert "Traceback" not in said and said.count("error: ") == 1
    return said.split("error: ")[1]


# Before anything is read


@pytest.mark.parametrize(
    "override, told",
    [
        ("training.stepz=3", ["unknown key 'training.stepz'", "did you mean training.steps?"]),
        ("training.optimizer.lrr=1", ["training.optimizer.lrr", "did you mean training.optimizer.lr?"]),
        ("modle.params.embed_dim=3", ["unknown key 'modle'", "did you mean model?"]),
        ("model.params.embeddim=3", ["model.params.embeddim: unknown", "did you mean embed_dim?"]),
        (
            "model.target=ldm.models.autoencoder.AutoencoderKL2",
            ["model.target", "did you mean", "AutoencoderKL"],
        ),
        ("training.steps=many", ["training.steps", "expected int", "'many'"]),
        ("training.precision=fp16", ["training.precision", "'auto', '32', 'bf16'"]),
        ("training.optimizer.decay=step", ["training.optimizer.decay", "'constant', 'cosine', 'linear'"]),
        ("training.steps=0", ["training", "steps must be a finite number above 0"]),
        ("data.params.root=/nowhere/at/all", ["image folder /nowhere/at/all does not exist"]),
        ("init_from=/nowhere/at/all", ["/nowhere/at/all does not exist"]),
        ("training.accelerator=gpu", ["torch sees no GPU"]),
    ],
)
def test_mistakes_in_overrides(place, override, told):
    if "gpu" in override:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    said = refused(place, "ae.yaml", override)
    assert all(text in said for text in told), said


def test_typos_in_the_yaml_are_told_together_with_their_lines(place):
    config = T.autoencoder_config(place / "images", place / "runs")
    config["training"] = {**config["training"], "batchsize": 3}
    config["loss"] = {"target": config["loss"]["target"], "params": {"kl_wieght": 1.0}}
    T.write_config(place / "typos.yaml", config)
    said = refused(place, "typos.yaml")
    lines = (place / "typos.yaml").read_text().splitlines()
    for key, meant in (("batchsize", "batch_size"), ("kl_wieght", "kl_weight")):
        line = next(i for i, text in enumerate(lines, 1) if key in text)
        assert f"typos.yaml:{line}:" in said and f"{key}: unknown; did you mean" in said and meant in said


def test_a_typo_does_not_wait_for_torch(place):
    """The real command, in a process that imports nothing beforehand."""
    code = (
        "import atexit, sys; from ldm.cli import run_verb\n"
        "atexit.register(lambda: print([m for m in ('torch', 'pytorch_lightning') if m in sys.modules]))\n"
        f"run_verb('train', [{str(place / 'ae.yaml')!r}, 'training.stepz=3'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=T.ROOT, timeout=60
    )
    assert done.returncode == 1 and "did you mean training.steps?" in done.stderr
    assert done.stdout.strip() == "[]"


def test_missing_root_says_how_to_give_it(place):
    config = T.autoencoder_config(Path("???"), place / "runs")
    T.write_config(place / "rootless.yaml", config)
    said = refused(place, "rootless.yaml")
    assert "data.params.root: no value yet; give data.params.root=VALUE on the command line" in said


# Before anything is trained


def test_first_stage_that_does_not_exist(place, trained):
    said = refused(place, "ldm.yaml", f"first_stage={place / 'runs' / 'aee'}")
    assert "aee does not exist; give the run folder of a trained autoencoder" in said and "has ae" in said
    empty = place / "empty"
    empty.mkdir(exist_ok=True)
    assert "is no run folder" in refused(place, "ldm.yaml", f"first_stage={empty}")


@pytest.mark.parametrize(
    "override, told",
    [
        ("network.params.in_channels=4", "the network takes 4 channels"),
        ("data.params.channels=1", "set data.params.channels=3"),
        ("data.params.size=17", "not a multiple of the autoencoder's downsampling factor 2"),
        ("data.params.layout=flat", "num_classes: auto: the data has no classes"),
        ("sampling.spacing=karas", "karas"),
    ],
)
def test_parts_that_do_not_fit(place, trained, override, told):
    assert told in refused(place, "ldm.yaml", override)


def test_folder_without_images(place, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    assert "no images under" in refused(place, "ae.yaml", f"data.params.root={tmp_path}")


# What it prints


def test_print_config_is_complete_and_can_be_used_again(place):
    said = T.finish(place / "ae.yaml", "training.steps=7", "--print-config", log=place / "log")
    tree = yaml.safe_load(said)
    assert tree["training"]["steps"] == 7
    assert tree["training"]["keep"] == 2 and tree["training"]["optimizer"]["clip"] == 1.0  # defaults
    assert tree["init_from"] is None and tree["logging"]["validation_batches"] == 20
    again = place / "again.yaml"
    again.write_text(said)
    assert complete_yaml(*load_run(again)).rstrip() == said.rstrip()


def left(runs: Path) -> list[Path]:
    return sorted(runs.rglob("*")) if runs.exists() else []


def test_dry_run_of_the_autoencoder(place):
    before = left(place / "runs")
    said = T.finish(place / "ae.yaml", "name=dry", "--dry-run", log=place / "log")
    assert left(place / "runs") == before
    for text in (
        "autoencoder 'dry': one step of 8 images on cpu",
        "15 images to train on, 3 held out",
        "parameters encoder",
        "parameters objective.discriminator",
        "sample     image      (3, 16, 16) torch.float32",
        "figure     rec_loss",
        "figure     disc_loss",  # though it only wakes at step 4 of a run
        "memory     peak",
    ):
        assert text in said, text


def test_dry_run_of_the_diffusion_model(place, trained):
    before = left(place / "runs")
    said = T.finish(
        place / "ldm.yaml",
        "name=dry",
        "--dry-run",
        "training.devices=2",
        "training.accumulate=2",
        log=place / "log",
    )
    assert left(place / "runs") == before
    for text in (
        "diffusion 'dry': one step of 4 images on cpu",  # one device's share
        "parameters first_stage_model",
        "0.000 M trained",
        "parameters conditioner",
        "sample     mean       (2, 8, 8)",
        "figure     loss",
        "figure     grad_norm",
        "memory     peak",
    ):
        assert text in said, text
    assert "error: training.batch_size 8 does not divide" in T.finish(
        place / "ldm.yaml", "--dry-run", "training.accumulate=3", log=place / "log", code=1
    )


def test_what_a_run_says_and_leaves(place, trained):
    run = place / "runs" / "ae"
    lines = trained.splitlines()
    assert lines[0] == f"{place / 'images'}: 18 images in 2 classes (cat, dog)"
    assert lines[1].startswith(f"{run}: autoencoder, 0.04 M trained parameters")
    assert lines[2] == "data: 15 images to train on, 3 held out; 4 steps of 8"
    assert lines[3].startswith("device: 1 x CPU") and lines[3].endswith("precision 32-true")
    validations = [line for line in lines[4:] if ": validation l1 " in line]
    assert [line.split(":")[0] for line in validations] == ["step 2", "step 4"]
    (last,) = [line for line in lines[4:] if line.startswith("step 4/4: ")]
    assert "images/s, rec_loss" in last and "kl_loss" in last
    assert lines[-1] == f"done: {run}" and len(lines) == 8  # nothing of Lightning's, no bar, no warning
    assert "\r" not in trained
    assert T.leftovers(run) == []
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["training"]["steps"] == 4 and config["training"]["keep"] == 2
    described = native.read_description(run / native.MODEL_FILE)
    assert described["classes"] == ["cat", "dog"] and described["step"] == 4 and described["weights"] == "ema"
    with Image.open(run / "images" / "reconstruction-00000004.png") as picture:
        assert picture.width > picture.height  # three images over their reconstructions


def test_scale_lr_is_said(place):
    said = T.finish(
        *(place / "ae.yaml", "name=scaled", "training.steps=1", "training.optimizer.scale_lr=true"),
        *("training.optimizer.lr=1e-5", "training.optimizer.warmup=0"),
        log=place / "log",
    )
    assert "scale_lr: learning rate 1e-05 x batch size 8 = 8e-05" in said
    assert float(T.rows(place / "runs" / "scaled")[0]["lr"]) == pytest.approx(8e-5)


def test_diffusion_run_over_gray_images_without_classes(place, tmp_path):
    """The whole path on an awkward folder: flat, gray, relative paths with spaces, TensorBoard events."""
    T.write_images(tmp_path / "my images", classes=(), each=6, mode="L")
    T.write_config(tmp_path / "ae.yaml", T.autoencoder_config(Path("my images"), Path("my runs")))
    T.finish("ae.yaml", "training.steps=4", log=tmp_path / "log", cwd=tmp_path)
    config = T.diffusion_config(Path("my images"), Path("my runs"), Path("my runs/ae"))
    config["conditioner"] = None
    T.write_config(tmp_path / "ldm.yaml", config)
    said = T.finish(
        *("ldm.yaml", "training.steps=4", "sampling.guidance=1", "network.params.num_classes=null"),
        *("network.params.adm_in_channels=null", "logging.tensorboard=true", "logging.images_every=2"),
        log=tmp_path / "log",
        cwd=tmp_path,
    )
    assert "done: my runs/ldm" in said and "Warning" not in said
    run = tmp_path / "my runs" / "ldm"
    assert sorted(p.name for p in (run / "images").iterdir()) == [f"samples-0000000{i}.png" for i in (2, 4)]
    assert native.read_description(run / native.MODEL_FILE)["classes"] is None


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_real_command_on_a_terminal(place):
    """`python train.py` itself, with a bar, stopped by Ctrl-C."""
    ours, theirs = os.openpty()
    arguments = [sys.executable, "train.py", place / "ae.yaml", "name=terminal", "logging.progress=true"]
    process = subprocess.Popen(
        [*map(str, arguments), "training.steps=100000", "training.checkpoint_every=null"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=T.ROOT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(theirs)
    said, stop_at, interrupted = b"", time.monotonic() + 60, False
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if time.monotonic() > stop_at:
            process.kill()
        if select.select([ours], [], [], 0.1)[0]:
            try:
                said += os.read(ours, 4096)
            except OSError:  # what Linux says when the other side has closed
                break
        if not interrupted and said.count(b"images/s") >= 3:
            process.send_signal(signal.SIGINT)
            interrupted = True
    os.close(ours)
    assert process.wait(timeout=60) == 130, said.decode()
    text = said.decode()
    assert "/100000 steps |" in text and "rec_loss" in text and "images/s" in text
    (step,) = T.steps_saved(place / "runs" / "terminal")
    assert f"stopped at step {step}; the same command continues" in text and "Traceback" not in text
