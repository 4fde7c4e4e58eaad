"""What happens around the steps of a run: figures, validation, pictures, checkpoints, and the end."""

import time
from collections.abc import Callable, Iterable

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.training.logs import RunLogs
from ldm.training.progress import Progress
from ldm.training.run_folder import RunFolder
from ldm.training.settings import LoggingSettings, TrainingSettings
from ldm.training.task import Task


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def across_ranks(trainer: pl.Trainer, values: dict[str, Tensor], how: str = "mean") -> dict[str, Tensor]:
    """The mean or sum of 0-d tensors over all processes."""
    if trainer.world_size == 1:
        return values
    stacked = trainer.strategy.reduce(torch.stack([v.float() for v in values.values()]), reduce_op=how)
    return dict(zip(values, stacked, strict=True))


class Figures(pl.Callback):
    """Progress and `logs/`: losses, learning rate, images a second (waits for data included), time left."""

    def __init__(self, logs: RunLogs | None, logging: LoggingSettings, training: TrainingSettings):
        self.logs, self.logging, self.training = logs, logging, training
        self.progress: Progress | None = None
        self._seconds, self._images = 0.0, 0

    def on_train_start(self, trainer, task: Task) -> None:
        if trainer.is_global_zero and self.logging.progress:
            self.progress = Progress(self.training.steps, "step", initial=task.step)

    def on_train_batch_end(self, trainer, task: Task, outputs, batch, batch_idx) -> None:
        due = _due(task.step, self.logging.every) or task.step == self.training.steps
        values = across_ranks(trainer, task.logs) if due else {}
        figures = {key: float(value) for key, value in values.items()}  # waits for the device, so time it
        self._seconds += time.perf_counter() - task.free_since
        self._images += self.training.batch_size
        if due:
            self._report(task, figures)
        if due or task.step % self.training.max_bad_steps == 0:
            task.check_finite()
        if self.progress is not None:
            self.progress.advance()

    def _report(self, task: Task, figures: dict[str, float]) -> None:
        rate = self._images / max(self._seconds, 1e-9)
        self._seconds, self._images = 0.0, 0
        if self.logs is not None:
            self.logs.add("train", task.step, figures | {"lr": task.last_lr, "images_per_second": rate})
        if self.progress is not None:
            shown = [f"{name} {figures[name]:.4g}" for name in task.shown if name in figures]
            self.progress.show(", ".join([f"{rate:,.0f} images/s", *shown]))

    def say(self, text: str) -> None:
        """A line beside the progress."""
        if self.progress is not None:
            self.progress.say(text)

    def on_train_end(self, trainer, task) -> None:
        self._close()

    def on_exception(self, trainer, task, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.close()
            self.progress = None


class Validation(pl.Callback):
    """Means over held-out images, with averaged weights and the same noise each time.

    batches(rank, processes): this process's share of the images, and whether it is one: a process without a
    share measures some batch all the same, for the others wait for its figures, and counts it for nothing.
    """

    def __init__(
        self,
        batches: Callable[[int, int], tuple[Iterable[dict], bool]] | None,
        logs: RunLogs | None,
        figures: Figures,
        every: int | None,
        steps: int,
    ):
        self.batches, self.logs, self.figures = batches, logs, figures
        self.every, self.steps = every, steps

    def on_train_batch_end(self, trainer, task: Task, outputs, batch, batch_idx) -> None:
        if self.batches is None or self.every is None:
            return
        if _due(task.step, self.every) or task.step == self.steps:
            means = self.measure(trainer, task)
            if self.logs is not None:
                self.logs.add("validation", task.step, means)
            text = ", ".join(f"{k} {v:.4g}" for k, v in means.items())
            self.figures.say(f"step {task.step}: validation {text}")

    def measure(self, trainer, task: Task) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=task.device)
        batches, counts = self.batches(trainer.global_rank, trainer.world_size)
        with task.evaluating(), trainer.precision_plugin.forward_context():
            for held_out in batches:
                held_out = trainer.strategy.batch_to_device(held_out, task.device)
                # The noise of an image is that of its place in the set, at every validation.
                measured = task.measure({**held_out, "position": held_out["index"]})
                for name, values in measured.items():
                    sums[name] = sums.get(name, 0) + values.float().sum() * counts
                count += len(held_out["index"]) * counts
        sums = across_ranks(trainer, {**sums, "count": count}, "sum")
        total = float(sums.pop("count"))
        return {name: float(value) / total for name, value in sums.items()}


class Pictures(pl.Callback):
    """Writes `images/<name>-<step>.png` at intervals and at the end; `draw(task)` makes the picture."""

    def __init__(self, name: str, draw: Callable, folder: RunFolder, every: int | None, steps: int):
        self.name, self.draw, self.folder, self.every, self.steps = name, draw, folder, every, steps

    def on_train_batch_end(self, trainer, task: Task, outputs, batch, batch_idx) -> None:
        if self.every is None or not trainer.is_global_zero:
            return
        if _due(task.step, self.every) or task.step == self.steps:
            with task.evaluating(), trainer.precision_plugin.forward_context():
                picture = self.draw(task)
            picture.save(self.folder.images / f"{self.name}-{task.step:08d}.png")


class Checkpoints(pl.Callback):
    """Saves at intervals, at the end, and when the run is asked to stop; ends it when its steps are done."""

    def __init__(self, folder: RunFolder, description: dict, extra: dict, training: TrainingSettings):
        self.folder, self.description, self.extra, self.training = folder, description, extra, training

    def on_train_batch_end(self, trainer, task: Task, outputs, batch, batch_idx) -> None:
        if task.step >= self.training.steps:
            trainer.should_stop = True
        if _due(task.step, self.training.checkpoint_every) or trainer.should_stop:
            if trainer.is_global_zero:
                self.folder.save({**task.state(), **self.extra}, self.description, self.training.keep)
            trainer.strategy.barrier()
