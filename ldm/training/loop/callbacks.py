"""What happens around the steps of a run: progress, pictures, checkpoints, and the end."""

import time

import pytorch_lightning as pl

from ldm.checkpoints.description import Description
from ldm.training.loop.progress import Progress
from ldm.training.method import Method
from ldm.training.run_folder import RunFolder


def _due(method: Method, every: int | None) -> bool:
    return every is not None and method.step % every == 0


class ProgressLine(pl.Callback):
    """Steps done, and the figures that were logged last."""

    def __init__(self):
        self.progress: Progress | None = None
        self._shown: dict | None = None

    def on_train_start(self, trainer, method: Method) -> None:
        if trainer.is_global_zero and method.keys.logging.progress:
            self.progress = Progress(method.settings.steps, "step", initial=method.step)

    def on_train_batch_end(self, trainer, method: Method, outputs, batch, batch_idx) -> None:
        if self.progress is None:
            return
        figures = method.figures
        if figures is not self._shown and figures:
            self._shown = figures
            shown = [f"{name} {figures[name]:.4g}" for name in method.shown if name in figures]
            self.progress.show(", ".join([f"{figures['images_per_second']:,.0f} images/s", *shown]))
        self.progress.advance()

    def on_validation_end(self, trainer, method: Method) -> None:
        if self.progress is not None:
            figures = {
                name.removeprefix("validation/"): float(value)
                for name, value in trainer.logged_metrics.items()
                if name.startswith("validation/")
            }
            text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self.progress.say(f"step {method.step}: validation {text}")

    def on_train_end(self, trainer, method) -> None:
        self._close()

    def on_exception(self, trainer, method, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.close()
            self.progress = None


class Pictures(pl.Callback):
    """Writes `images/<name>-<step>.png` at intervals and at the end."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_train_batch_end(self, trainer, method: Method, outputs, batch, batch_idx) -> None:
        every = method.keys.logging.images_every
        if every is None or not trainer.is_global_zero:
            return
        if _due(method, every) or method.step == method.settings.steps:
            with method.evaluating(), trainer.precision_plugin.forward_context():
                picture = method.draw()
            picture.save(self.folder.images / f"{method.picture}-{method.step:08d}.png")


class Checkpoints(pl.Callback):
    """Saves at intervals, at the end, and when the run is asked to stop; ends it when its steps are done.

    Lightning's own checkpoints replay data and noise when a run goes on; these go on in the same bits. One is
    written when all that its step brings (logs, validation) is: what a killed run lost then comes again.
    """

    def __init__(self, folder: RunFolder, description: Description):
        self.folder, self.description = folder, description
        self._saved, self._between = 0, False

    def on_train_start(self, trainer, method: Method) -> None:
        self._saved = method.step

    def on_train_batch_start(self, trainer, method: Method, batch, batch_idx) -> None:
        self._between = False
        if _due(method, method.settings.checkpoint_every):
            began = time.perf_counter()
            self._save(trainer, method)
            trainer.strategy.barrier()
            method.free_since += time.perf_counter() - began  # no time of the step's

    def on_train_batch_end(self, trainer, method: Method, outputs, batch, batch_idx) -> None:
        self._between = True
        if method.step >= method.settings.steps:
            trainer.should_stop = True

    def on_train_end(self, trainer, method: Method) -> None:
        self._save(trainer, method)
        trainer.strategy.barrier()

    def on_exception(self, trainer, method: Method, exception) -> None:
        method.on_validation_end()  # the weights are the run's own again, should it have come in between
        if self._between and _due(
            method, method.settings.checkpoint_every
        ):  # an image that cannot be read, say
            self._save(trainer, method)

    def _save(self, trainer, method: Method) -> None:
        if method.step == self._saved:
            return
        self._saved = method.step
        if trainer.is_global_zero:
            self.folder.save(method.state(), self.description, method.settings.keep)
