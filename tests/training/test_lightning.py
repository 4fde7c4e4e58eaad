"""What a Lightning user expects of the trainer: hooks, steps, callbacks and loggers from the YAML."""

import json
from pathlib import Path

import pytest
import training_runs as T

OWN = '''
import json
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger


class Diary(pl.Callback):
    """Writes down what the trainer tells."""

    def __init__(self, path):
        self.path = path

    def note(self, trainer, event, **more):
        step = trainer.global_step
        with open(self.path, "a") as file:
            file.write(json.dumps({"event": event, "step": step, **more}) + "\\n")

    def on_train_start(self, trainer, module):
        self.note(trainer, "start")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        assert any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        self.note(trainer, "optimizer")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.note(trainer, "batch", module=type(module).__name__)

    def on_validation_end(self, trainer, module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.note(trainer, "validation", metrics=metrics)


class Lines(Logger):
    name, version = "lines", 0

    def __init__(self, path):
        super().__init__()
        self.path = path

    def log_metrics(self, metrics, step=None):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\\n")

    def log_hyperparams(self, params):
        pass
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("lightning")
    T.write_images(place / "images")
    (place / "own_parts.py").write_text(OWN)
    return place


def config(place: Path, **changes) -> dict:
    tree = T.autoencoder_config(place / "images", place / "runs")
    tree["training"] |= {"steps": 7, "checkpoint_every": 3}
    tree["logging"] |= {"every": 2, "validate_every": 3, "images_every": None}
    return tree | changes


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finish(place: Path, tree: dict, *overrides: str, code: int = 0) -> str:
    path = T.write_config(place / f"{tree['name']}.yaml", tree)
    return T.finish(path, *overrides, log=place / "log", cwd=place, code=code)


def test_a_callback_and_a_logger_of_ones_own(place):
    diary, log = place / "diary.jsonl", place / "lines.jsonl"
    tree = config(
        place,
        name="own",
        callbacks=[{"target": "own_parts.Diary", "params": {"path": str(diary)}}],
        loggers=[{"target": "own_parts.Lines", "params": {"path": str(log)}}],
    )
    finish(place, tree, "training.steps=4")
    finish(place, tree)  # goes on at step 4
    events = lines(diary)
    assert [e["step"] for e in events if e["event"] == "start"] == [0, 4]
    batches = [e for e in events if e["event"] == "batch"]
    assert [e["step"] for e in batches] == list(range(1, 8)) and batches[0]["module"] == "AutoencoderMethod"
    # Once a step, also when the discriminator's optimizer steps as well.
    assert [e["step"] for e in events if e["event"] == "optimizer"] == list(range(7))
    validations = [e for e in events if e["event"] == "validation"]
    assert [e["step"] for e in validations] == [3, 4, 6, 7]
    assert {"validation/psnr", "train/rec_loss"} <= set(validations[-1]["metrics"])
    # The CSV, a logger too, has the same figures at the same steps.
    written = [line for line in lines(log) if "train/rec_loss" in line]
    rows = T.rows(place / "runs" / "own", "train")
    steps = [int(row["step"]) for row in rows]
    assert steps == [2, 4, 6, 7] and sorted({line["step"] for line in written}) == steps
    for row in rows:
        same = [line for line in written if line["step"] == int(row["step"])]
        assert float(row["rec_loss"]) == pytest.approx(same[-1]["train/rec_loss"], rel=1e-4)
    assert [int(row["step"]) for row in T.rows(place / "runs" / "own", "validation")] == [3, 4, 6, 7]


def test_a_longer_cosine_run_says_that_its_learning_rate_jumps(place):
    tree = config(place, name="longer")  # cosine
    finish(place, tree, "training.steps=4")
    said = finish(place, tree, "training.steps=7")
    rows = T.rows(place / "runs" / "longer", "train")
    now = float(next(row["lr"] for row in rows if row["step"] == "6"))
    assert "training.steps was 4: the learning rate" in said and "jumps from 0 to" in said
    assert now > 0
    tree = config(place, name="constant")
    tree["training"]["optimizer"] = {"lr": 1e-3}
    finish(place, tree, "training.steps=2")
    assert "jumps" not in finish(place, tree, "training.steps=3")


def test_a_callback_of_lightnings_ends_the_run_with_a_checkpoint(place):
    stop = {
        "target": "pytorch_lightning.callbacks.EarlyStopping",
        "params": {"monitor": "validation/psnr", "mode": "min", "patience": 1, "divergence_threshold": -1.0},
    }
    finish(place, config(place, name="early", callbacks=[stop]))
    assert T.steps_saved(place / "runs" / "early")[-1] == 3


def test_tensorboard_events_of_a_resumed_run(place):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tree = config(place, name="events")
    tree["logging"]["tensorboard"] = True
    finish(place, tree, "training.steps=4")
    finish(place, tree)
    events = EventAccumulator(str(place / "runs" / "events" / "logs")).Reload()
    assert [e.step for e in events.Scalars("train/rec_loss")] == [2, 4, 6, 7]
    assert [e.step for e in events.Scalars("validation/psnr")] == [3, 4, 6, 7]


def test_weights_and_biases_offline(place):
    pytest.importorskip("wandb")
    logger = {
        "target": "pytorch_lightning.loggers.WandbLogger",
        "params": {"project": "ldm", "offline": True, "save_dir": str(place / "wandb")},
    }
    finish(place, config(place, name="wandb", loggers=[logger]))
    (run,) = (place / "wandb").glob("wandb/offline-run-*")
    assert list(run.glob("*.wandb"))


def test_parts_of_another_kind_are_refused_also_by_a_dry_run(place):
    checkpoint = {"target": "pytorch_lightning.callbacks.ModelCheckpoint", "params": {}}
    lines_ = {"target": "own_parts.Lines", "params": {"path": "x"}}
    for part, told in (
        (checkpoint, "training.checkpoint_every"),
        (lines_, "callbacks.0 is a Lines, no Callback"),
    ):
        for more in ((), ("--dry-run",)):
            said = finish(place, config(place, name="other", callbacks=[part]), *more, code=1)
            assert told in said and "Traceback" not in said


def test_mistakes_in_callbacks_are_told_in_time(place):
    tree = config(place, name="wrong", callbacks=[{"target": "own_parts.Diari", "params": {}}])
    assert "did you mean own_parts.Diary" in finish(place, tree, code=1)
    tree = config(place, name="wrong", callbacks=[{"target": "own_parts.Diary", "params": {"pth": "x"}}])
    assert "callbacks.0.params.pth: unknown; did you mean path" in finish(place, tree, code=1)
    assert not (place / "runs" / "wrong").exists()
