"""Workers and processes do not change what is trained: only how fast, and the last bits of sums."""

import os
import signal
from pathlib import Path

import pytest
import torch
import training_runs as T

STEPS = 40
PLAIN = {"every": 1, "images_every": None, "validate_every": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images and configs without dropout, whose masks belong to a process; a first stage in `runs/ae`."""
    place = tmp_path_factory.mktemp("parallel")
    images, runs = T.write_images(place / "images", each=12), place / "runs"
    # A large eps: AdamW's first steps are else lr * sign(gradient), which magnifies rounding.
    training = T.TRAINING | {"steps": STEPS, "checkpoint_every": None, "optimizer": {"lr": 1e-3, "eps": 1e-2}}
    plain = {"training": training, "logging": T.LOGGING | PLAIN}
    ae = T.autoencoder_config(images, runs) | plain
    ae["model"] = {"target": ae["model"]["target"], "params": {**ae["model"]["params"]}}
    ae["model"]["params"]["ddconfig"] = ae["model"]["params"]["ddconfig"] | {"dropout": 0.0}
    ldm = T.diffusion_config(images, runs, runs / "ae") | plain
    ldm["network"] = ldm["network"] | {"params": ldm["network"]["params"] | {"dropout": 0.0}}
    T.write_config(place / "ae.yaml", ae)
    T.write_config(place / "ldm.yaml", ldm)
    for kind in ("ae", "ldm"):
        T.finish(place / f"{kind}.yaml", log=place / "log")
    return place


def assert_close(a: Path, b: Path, rtol: float = 2e-3) -> None:
    """Weights, averages and figures of two runs, up to rounding."""
    one, two = T.newest_state(a), T.newest_state(b)
    assert one["step"] == two["step"]
    for part in ("model", "ema"):
        for name, value in one[part].items():
            scale = max(value.abs().max().item(), 1e-3)
            torch.testing.assert_close(two[part][name], value, rtol=rtol, atol=rtol * scale, msg=name)
    for table in ("train", "validation"):
        left, right = T.rows(a, table), T.rows(b, table)
        assert [row["step"] for row in left] == [row["step"] for row in right]
        for x, y in zip(left, right, strict=True):
            # The adaptive weight is a ratio of small gradients, and the total loss follows it.
            for name in x.keys() - {"images_per_second", "d_weight", "total_loss"}:
                assert float(y[name] or 0) == pytest.approx(float(x[name] or 0), rel=1e-2, abs=1e-2), name


def test_number_of_workers_does_not_change_bits(place):
    """Nor does a SIGTERM to everybody, as batch systems send it, lose a batch with a worker."""
    command = T.start(place / "ae.yaml", "name=ae-workers", "training.workers=2", log=place / "log")
    command.until(lambda: len(T.rows(place / "runs/ae-workers")) >= 3)
    os.killpg(command.pid, signal.SIGTERM)
    assert command.wait() == 130, command.output
    assert len(T.steps_saved(place / "runs/ae-workers")) == 1
    command.wait_for_group()
    T.finish(place / "ae.yaml", "name=ae-workers", "training.workers=2", log=place / "log")
    assert T.run_differences(place / "runs/ae", place / "runs/ae-workers") == []


def interrupted(place: Path, kind: str, name: str, *overrides: str, everyone: bool) -> None:
    """SIGTERM to the first of two processes, or to both, which ends both with a checkpoint of one step."""
    command = T.start(
        place / f"{kind}.yaml", f"name={name}", "training.devices=2", *overrides, log=place / "log"
    )
    command.until(lambda: len(T.rows(place / "runs" / name)) >= 3)
    (os.killpg if everyone else os.kill)(command.pid, signal.SIGTERM)
    assert command.wait(timeout=30) == 130, command.output
    (step,) = T.steps_saved(place / "runs" / name)
    assert command.output.count(f"stopped at step {step}; the same command continues") == 1
    assert "Traceback" not in command.output
    command.wait_for_group()


def test_two_processes_train_the_same_diffusion_model(place):
    interrupted(place, "ldm", "ldm-two", everyone=False)
    said = T.finish(place / "ldm.yaml", "name=ldm-two", "training.devices=2", log=place / "log")
    assert "device: 2 x CPU" in said and said.count("continuing") == 1
    assert said.count("device: ") == 1 and said.count("done: ") == 1  # one process speaks
    assert_close(place / "runs/ldm", place / "runs/ldm-two")
    assert T.leftovers(place / "runs/ldm-two") == []


def test_two_processes_with_a_discriminator_and_accumulation(place):
    """Two processes x two parts against one x four: what BatchNorm and the adaptive weight see agrees."""
    interrupted(place, "ae", "ae-two", "training.accumulate=2", everyone=True)
    T.finish(
        *(place / "ae.yaml", "name=ae-two", "training.devices=2", "training.accumulate=2"), log=place / "log"
    )
    T.finish(place / "ae.yaml", "name=ae-four", "training.accumulate=4", log=place / "log")
    assert_close(place / "runs/ae-four", place / "runs/ae-two")
    steps = [
        state["state"][0]["step"].item() for state in T.newest_state(place / "runs/ae-two")["optimizers"]
    ]
    assert steps == [STEPS, STEPS - T.LOSS["params"]["disc_start"]]


def test_an_error_in_one_process_ends_all(place):
    """The second process alone finds that it cannot read a file of its share."""
    images = T.write_images(place / "broken", classes=(), each=16)
    (images / "3.png").write_bytes(b"no picture")
    command = T.start(
        *(place / "ae.yaml", "name=ae-broken", "training.devices=2", f"data.params.root={images}"),
        "data.params.validation=0",
        log=place / "log",
    )
    assert command.wait(timeout=40) != 0
    assert "3.png" in command.output
    command.wait_for_group()


def test_batch_that_does_not_divide(place):
    said = T.finish(
        *(place / "ldm.yaml", "name=odd", "training.devices=2", "training.batch_size=7"),
        log=place / "log",
        code=1,
    )
    assert "error: training.batch_size 7 does not divide into 2 device(s)" in said
    assert "images" not in said and not (place / "runs/odd").exists()  # told before any data was looked at
