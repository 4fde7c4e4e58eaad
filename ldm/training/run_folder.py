"""A run folder: where things lie, what is written when, and how a run finds its way back."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from ldm import config as configuration
from ldm.checkpoints import native
from ldm.checkpoints.description import Description
from ldm.files import Busy, locked
from ldm.training.run_config import complete, load_run
from ldm.weights.errors import CorruptCheckpoint

log = logging.getLogger(__name__)

#: What may change between two starts of one run without making it another run. So may the folder of the
#: images if they are the same: see `RunFolder._compare`.
MAY_CHANGE = (
    "name",
    "runs",
    "logging",
    "callbacks",
    "loggers",
    "sampling",
    "training.steps",
    "training.accumulate",
    "training.devices",
    "training.accelerator",
    "training.workers",
    "training.checkpoint_every",
    "training.keep",
    "training.max_bad_steps",
    "training.compile",
    "data.params.on_error",
    "data.params.max_pixels",
)
_ROOT = "data.params.root"
#: What a killed run can leave half written.
_LEFTOVERS = ("checkpoints/.*.partial", ".*.partial", "logs/*.tmp")


class RunFolder:
    """`config.yaml`, `checkpoints/`, `model.safetensors`, `images/`, `logs/` of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.model = path / native.MODEL_FILE
        self.images = path / "images"
        self.logs = path / "logs"
        self._damaged: list[Path] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, no other process may train here; the system lets go of the folder however the process ends.

        Raises:
            ValueError: another process does.
        """
        fresh = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / ".lock"
        try:
            with locked(lock, wait=False):
                yield
        except Busy:
            raise ValueError(
                f"{self.path} is being trained by another process; give this run another name (name=...)"
            ) from None
        finally:
            if fresh and list(self.path.iterdir()) == [lock]:  # failed before there was anything to keep
                lock.unlink()
                self.path.rmdir()

    def find(self, config: Mapping) -> dict | None:
        """The state that this complete config continues from, None to start; changes nothing.

        Raises:
            ValueError: the folder holds a run of another config, listed difference by difference, or a model
                without the checkpoint that could continue it.
        """
        state, self._damaged = self._newest()
        if state is not None or self.model.exists():
            self._compare(config, (state or {}).get("data"))
        if state is None and self.model.exists():
            raise ValueError(
                f"{self.path} holds a trained model, but no checkpoint to continue from. Give this run "
                "another name (name=...), or delete the folder to start over."
            )
        return state

    def prepare(self, config: Mapping) -> None:
        """Make the folders, write the config, and clear away what a killed run left half written."""
        for folder in (self.checkpoints, self.images, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        for file in self._damaged:
            log.warning("set aside as %s", file.rename(file.with_name(file.name + ".damaged")).name)
        self._sweep()
        configuration.save(config, self.config)

    def _sweep(self) -> None:
        for pattern in _LEFTOVERS:
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)

    def planned_steps(self) -> int | None:
        """How long the run was to be when it was last started."""
        if not self.config.exists():
            return None
        return OmegaConf.select(OmegaConf.load(self.config), "training.steps")

    def newest_state(self) -> dict | None:
        """The newest checkpoint that is whole, for a process that only reads."""
        return self._newest()[0]

    def _compare(self, config: Mapping, data: Mapping | None) -> None:
        """`data` is the identity of the images that the run has seen, where a checkpoint tells it."""
        if not self.config.exists():
            raise ValueError(f"{self.path} holds a run without its config.yaml; give this one another name")
        changed = [
            line
            for line in configuration.differences(complete(*load_run(self.config)), config)
            if not line.startswith(tuple(f"{key}{mark}" for key in MAY_CHANGE for mark in ":."))
        ]
        advice = "Give this one another name (name=...), or delete the folder to start over."
        if data is not None and len(changed) == 1 and changed[0].startswith(f"{_ROOT}: "):
            if _same_images(config, data):
                log.info("the same images, in another place: %s", changed.pop())
            else:
                advice = (
                    "The images there are not those of this run, by their paths, sizes or dates. To move "
                    "them, keep their dates (`cp -a`, `rsync -a`) or leave a link in the old place. For "
                    "others: "
                    f"{advice[0].lower()}{advice[1:]}"
                )
        if changed:
            lines = "\n  ".join(changed)
            raise ValueError(f"{self.path} holds a run of another config:\n  {lines}\n{advice}")

    def _newest(self) -> tuple[dict | None, list[Path]]:
        """The newest state that can be read, and the damaged files after it, each named loudly."""
        damaged = []
        for file in sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True):
            try:
                state = native.read_training(file)
            except CorruptCheckpoint as error:
                log.warning("%s", error)
                damaged.append(file)
                continue
            if damaged:
                log.warning("resuming from %s instead, at step %d", file, state["step"])
            return state, damaged
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.checkpoints} can be read; delete the folder to start over"
            )
        return None, []

    def save(self, state: dict, description: Description, keep: int) -> Path:
        """Write a checkpoint and the exported model, then drop the oldest beyond `keep`.

        Raises:
            OSError: the disk is full or cannot be written; what was there before is untouched.
        """
        path = self.checkpoints / f"step-{state['step']:08d}.ckpt"
        state = {"format": native.FORMAT, "description": description.plain(), **state}
        try:
            native.save_training(path, state)
            self._export(state)
        except (OSError, RuntimeError) as error:
            reason = _system_error(error)
            if reason is None:
                raise
            raise OSError(
                f"cannot write {path} ({reason}). What was written before is whole: free some space, and the "
                "same command continues from the newest checkpoint"
            ) from error
        for old in sorted(self.checkpoints.glob("step-*.ckpt"))[:-keep]:
            old.unlink()
        return path

    def finish(self, state: dict) -> None:
        """Export the model of a complete run that was killed between its last checkpoint and the export."""
        self._sweep()
        try:
            exported = native.read_description(self.model) if self.model.exists() else None
        except CorruptCheckpoint as error:
            log.warning("%s; it is written again", error)
            exported = None
        if exported is None or exported.get("step") != state["step"]:
            self._export(state)

    def _export(self, state: dict) -> None:
        weights = "ema" if state["ema"] else "raw"
        described = {**state["description"], "weights": weights, "step": state["step"]}
        native.save_model(self.model, {**state["model"], **state["ema"]}, described)


def _same_images(config: Mapping, seen: Mapping) -> bool:
    """Whether this config's training images are those that a run has seen, wherever they lie."""
    train = configuration.instantiate(config["data"], allow_foreign=True).split("train")
    return train.fingerprint() == seen["fingerprint"]


def _system_error(error: BaseException | None) -> str | None:
    """What the system said, also where torch's writer hid it behind an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return None if error is None else os.strerror(error.errno) if error.errno else str(error)
