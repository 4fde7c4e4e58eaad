"""A run that is killed and started again with the same command ends in the same bits."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import training_runs as T

from ldm.checkpoints import native

CHECKPOINT = "step-{:08d}.ckpt"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with images, configs, and one uninterrupted run of each kind in `runs here/`."""
    place = tmp_path_factory.mktemp("resume")
    images, runs = T.write_images(place / "images"), place / "runs here"
    T.write_config(place / "ae.yaml", T.autoencoder_config(images, runs))
    T.finish(place / "ae.yaml", log=place / "log")
    T.write_config(place / "cached.yaml", T.diffusion_config(images, runs, runs / "ae", "cached"))
    encoded = T.diffusion_config(images, runs, runs / "ae", "encoded") | {"cache": False}
    T.write_config(place / "encoded.yaml", encoded)
    for kind in ("cached", "encoded"):
        T.finish(place / f"{kind}.yaml", log=place / "log")
    return place


def killed(place: Path, kind: str, name: str, *overrides: str, die_at: tuple[str, str]) -> None:
    command = T.start(place / f"{kind}.yaml", f"name={name}", *overrides, log=place / "log", die_at=die_at)
    assert command.wait() == -signal.SIGKILL, command.output


def started(place: Path, kind: str, name: str, *overrides: str, row: int = 1) -> T.Command:
    """A run that is under way, `row` steps beyond the checkpoint that it started from."""
    run = place / "runs here" / name
    target = (T.steps_saved(run) or [0])[-1] + row
    command = T.start(place / f"{kind}.yaml", f"name={name}", *overrides, log=place / "log")
    command.until(lambda: "device: " in command.output)  # by then the rows beyond the checkpoint are gone
    command.until(lambda: len(T.rows(run)) >= target)
    return command


def resumed(place: Path, kind: str, name: str, *overrides: str) -> str:
    """The same command again, to the end."""
    return T.finish(place / f"{kind}.yaml", f"name={name}", *overrides, log=place / "log")


def assert_equal_to_uninterrupted(place: Path, kind: str, name: str) -> None:
    a, b = (place / "runs here" / run for run in (kind, name))
    assert T.newest_state(b)["step"] == 24
    assert T.run_differences(a, b) == []
    assert T.leftovers(b) == []


def test_autoencoder_killed_again_and_again(place):
    run = place / "runs here" / "ae-killed"
    killed(place, "ae", "ae-killed", die_at=("os.rename", CHECKPOINT.format(5)))
    assert T.steps_saved(run) == [] and list((run / "checkpoints").glob(".*.partial"))
    started(place, "ae", "ae-killed", row=8).send(signal.SIGKILL)  # at no particular moment
    killed(place, "ae", "ae-killed", die_at=("os.rename", CHECKPOINT.format(15)))
    assert T.steps_saved(run)[-1] == 10 and list((run / "checkpoints").glob(".*.partial"))
    killed(place, "ae", "ae-killed", die_at=("os.rename", native.MODEL_FILE))
    assert T.steps_saved(run)[-1] == 15
    assert native.read_description(run / native.MODEL_FILE)["step"] == 10
    assert "continuing" in resumed(place, "ae", "ae-killed")
    assert_equal_to_uninterrupted(place, "ae", "ae-killed")


def test_killed_between_the_last_checkpoint_and_the_export(place):
    killed(place, "ae", "ae-end", "training.checkpoint_every=null", die_at=("os.rename", native.MODEL_FILE))
    run = place / "runs here" / "ae-end"
    assert T.steps_saved(run) == [24] and not (run / native.MODEL_FILE).exists()
    assert "is complete" in resumed(place, "ae", "ae-end")
    assert_equal_to_uninterrupted(place, "ae", "ae-end")


def test_diffusion_from_cached_latents(place):
    shutil.rmtree(place / "runs here" / "latents")
    killed(place, "cached", "cached-killed", die_at=("open", "manifest.json"))  # while encoding
    killed(place, "cached", "cached-killed", die_at=("os.rename", CHECKPOINT.format(10)))
    command = started(place, "cached", "cached-killed", row=4)
    command.send(signal.SIGTERM)
    assert command.wait() == 130
    step = T.steps_saved(place / "runs here" / "cached-killed")[-1]
    assert f"stopped at step {step}; the same command continues" in command.output
    assert "Traceback" not in command.output
    # The run goes on with its own copy of the first stage.
    (place / "runs here" / "ae").rename(place / "runs here" / "ae-away")
    try:
        resumed(place, "cached", "cached-killed")
    finally:
        (place / "runs here" / "ae-away").rename(place / "runs here" / "ae")
    assert_equal_to_uninterrupted(place, "cached", "cached-killed")
    latents = [p.name for p in (place / "runs here" / "latents").iterdir() if not p.name.startswith(".")]
    assert len(latents) == 2 and not any("tmp" in name for name in latents)


def test_diffusion_that_encodes_on_the_fly(place):
    started(place, "encoded", "encoded-killed", row=7).send(signal.SIGKILL)
    command = started(place, "encoded", "encoded-killed", row=3)
    command.send(signal.SIGINT)
    assert command.wait() == 130
    resumed(place, "encoded", "encoded-killed")
    assert_equal_to_uninterrupted(place, "encoded", "encoded-killed")


def test_another_seed_gives_other_bits(place):
    T.finish(place / "ae.yaml", "name=ae-seed", "seed=1", log=place / "log")
    found = T.run_differences(place / "runs here" / "ae", place / "runs here" / "ae-seed")
    assert "state.model.decoder.conv_in.weight" in found and "logs/train.csv" in found


def test_one_process_at_a_time_and_a_second_ctrl_c(place):
    command = started(place, "ae", "ae-twice", row=7)
    command.send(signal.SIGSTOP)  # so that it is still there
    said = T.finish(place / "ae.yaml", "name=ae-twice", log=place / "second", code=1)
    assert "is being trained by another process" in said
    command.send(signal.SIGINT)
    command.send(signal.SIGINT)
    command.send(signal.SIGCONT)
    assert command.wait() == 130
    assert "the same command continues" in command.output
    resumed(place, "ae", "ae-twice")
    assert_equal_to_uninterrupted(place, "ae", "ae-twice")


def copy_run(place: Path, name: str) -> Path:
    return shutil.copytree(place / "runs here" / "ae", place / "runs here" / name)


def test_damaged_newest_checkpoint(place):
    run = copy_run(place, "ae-damaged")
    newest = run / "checkpoints" / CHECKPOINT.format(24)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    said = resumed(place, "ae", "ae-damaged")
    assert str(newest) in said and "resuming from" in said and CHECKPOINT.format(20) in said
    (run / "checkpoints" / f"{newest.name}.damaged").unlink()  # set aside, not lost
    assert_equal_to_uninterrupted(place, "ae", "ae-damaged")


def test_all_checkpoints_damaged(place):
    run = copy_run(place, "ae-ruined")
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(b"nothing")
    said = T.finish(place / "ae.yaml", "name=ae-ruined", log=place / "log", code=1)
    assert "can be read; delete the folder to start over" in said
    assert len(T.steps_saved(run)) == 2


def test_another_config_in_the_same_folder(place):
    run = copy_run(place, "ae-other")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    changes = ["training.optimizer.lr=0.002", "seed=3", "model.params.ddconfig.ch=16", "training.steps=30"]
    said = T.finish(place / "ae.yaml", "name=ae-other", *changes, log=place / "log", code=1)
    assert "holds a run of another config" in said
    assert re.findall(r"^  (.*)$", said, re.M) == [
        "model.params.ddconfig.ch: 8 -> 16",
        "training.optimizer.lr: 0.001 -> 0.002",
        "seed: 0 -> 3",
    ]
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_model_without_its_checkpoints_is_not_overwritten(place):
    run = copy_run(place, "ae-alone")
    shutil.rmtree(run / "checkpoints")
    said = T.finish(place / "ae.yaml", "name=ae-alone", log=place / "log", code=1)
    assert "holds a trained model, but no checkpoint to continue from" in said
    assert (run / native.MODEL_FILE).exists()


def test_complete_run_and_more_steps(place):
    constant = (
        "training.optimizer.decay=constant",
        "logging.validate_every=null",
        "logging.images_every=null",
    )
    T.finish(place / "ae.yaml", "name=ae-long", "training.steps=12", *constant, log=place / "log")
    said = T.finish(place / "ae.yaml", "name=ae-long", "training.steps=12", *constant, log=place / "log")
    assert "is complete: step 12 of 12" in said
    said = T.finish(place / "ae.yaml", "name=ae-long", "training.steps=16", *constant, log=place / "log")
    assert "continuing" in said and "at step 12 of 16" in said
    T.finish(place / "ae.yaml", "name=ae-straight", "training.steps=16", *constant, log=place / "log")
    assert T.run_differences(place / "runs here" / "ae-long", place / "runs here" / "ae-straight") == []


def test_full_disk(place):
    said = T.finish(place / "ae.yaml", "name=ae-full", log=place / "log", code=1, file_size=100_000)
    run = place / "runs here" / "ae-full"
    assert "error: cannot write" in said and CHECKPOINT.format(5) in said and "File too large" in said
    assert "Traceback" not in said
    assert not list((run / "checkpoints").iterdir())
    resumed(place, "ae", "ae-full")
    assert_equal_to_uninterrupted(place, "ae", "ae-full")
