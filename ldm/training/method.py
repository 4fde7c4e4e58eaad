"""What every training method shares: the optimizer step, the averages, the step counter, the state.

A method is one file with one class: its config keys, how it is built, its loss, what it validates and what it
draws. Accumulation, backward, clipping, the guard against bad steps, averaging and resuming are here, once.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
import torch
from PIL.Image import Image
from torch import Tensor, nn

from ldm.checkpoints.description import Description, described
from ldm.diffusion.random import subseed
from ldm.training.ema import EMA
from ldm.training.optimization import base_lr, clip_gradients, guarded_step, lr_factor, make_optimizer
from ldm.training.run import Run
from ldm.training.run_config import RunConfig

Figures = dict[str, Tensor]


class Diverged(ValueError):
    """The gradient stayed infinite or not a number."""


class Method(pl.LightningModule):
    """One way of training a model. A Lightning batch is one optimizer step's share of this device.

    A method says:
        Keys        the dataclass of its config keys, on top of `RunConfig`'s
        build       the method of a run: its networks, weights to start from, checks, data
        loss        what a step minimises
        validate    figures of held-out samples
        draw        a picture of how far the run is
    and, where it has them, `losses` and `trained` of several optimizers, `extra_state`, `keep`.

    What a step draws at random is addressed by (seed, position of the sample in the run): a batch holds
    `position` (B,) beside what its data set gives, `index` (B,) among it.

    Attributes:
        model: what is trained, averaged and saved.
        train_set, validation_set: what batches are made of; a `build` may put others in the place of the
            run's.
        sampling: defaults for sampling the model, as plain data; None for what is no diffusion model.
        step: optimizer steps taken so far, in the whole run.
    """

    Keys: ClassVar[type[RunConfig]] = RunConfig
    #: By the dotted path of a part, parameters that the method itself gives and no config may.
    supplies: ClassVar[Mapping[str, list[str]]] = {}
    #: Likewise, parameters for which a config may say `auto`; `build` provides them.
    offers: ClassVar[Mapping[str, list[str]]] = {}
    #: The figures that the progress line has room for.
    shown: tuple[str, ...] = ("loss",)
    #: What the pictures are called.
    picture: ClassVar[str] = "picture"
    #: Whether something that is trained has no gradient in some steps, which several processes must know.
    rests: ClassVar[bool] = False

    def __init__(self, run: Run, model: nn.Module):
        super().__init__()
        self.automatic_optimization = False
        self.keys, self.model = run.keys, model
        self.settings, self.seed = run.keys.training, run.keys.seed
        self.train_set, self.validation_set, self.classes = run.train, run.validation, run.train.classes
        self.data_identity = {"images": len(run.train), "fingerprint": run.train.fingerprint()}
        self.image_size = [run.train.size, run.train.size]
        self.sampling: dict | None = None
        self.step = 0
        self.last_lr = 0.0
        self.figures: dict[str, float] = {}  # of the last step that was logged
        self.ema: EMA | None = None
        self._bad_steps: Tensor | None = None
        self._optimizers: list[torch.optim.AdamW] = []
        self._pending: dict | None = None
        self._validation = ExitStack()
        self._sums: Figures = {}
        self._seconds, self._images, self.free_since = 0.0, 0, 0.0

    # -- what a method says --------------------------------------------------------------------------------

    @classmethod
    def build(cls, run: Run) -> "Method":
        """The method of a run, ready for its first step.

        Raises:
            ValueError: data, networks and keys that do not fit together; said now, not hours into the run.
        """
        raise NotImplementedError

    def loss(self, batch: dict) -> tuple[Tensor, Figures]:
        """The loss () of a batch, or of one of its parts, and figures to log, of any shape."""
        raise NotImplementedError

    def validate(self, batch: dict) -> Figures:
        """Figures (B,) of held-out samples, whose `position` is their index at every validation."""
        raise NotImplementedError

    def draw(self) -> Image:
        """A picture; called with averaged weights, in eval mode, without gradients."""
        raise NotImplementedError

    def describe(self) -> Description:
        """What the run's files say of its model."""
        known = {"classes": self.classes, "image_size": self.image_size, "sampling": self.sampling}
        return described(self.model).replaced(**known)

    def parts(self) -> dict[str, nn.Module]:
        """Everything that lies in memory, by a name for people, the network that is trained first."""
        return {"model": self.model}

    def example(self, count: int) -> dict:
        """A batch like those of training, without its values: for a plan."""
        sample = self.train_set[(0, 0)].items()
        return {name: value.new_empty((count, *value.shape)) for name, value in sample}

    def losses(self) -> list[Callable[[dict], tuple[Tensor, Figures]]]:
        """What this step minimises one after the other, each by the optimizer of its place in `trained`."""
        return [self.loss]

    def trained(self) -> list[list[nn.Parameter]]:
        """The parameters of each optimizer."""
        return [[p for p in self.model.parameters() if p.requires_grad]]

    def extra_state(self) -> dict[str, Tensor]:
        """Trained tensors that are not part of the model (a discriminator, say)."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"unexpected extra state: {sorted(state)[:5]}")

    def keep(self, folder: Path) -> None:
        """Write into the run folder what the run needs besides its checkpoints."""

    # -- the step ------------------------------------------------------------------------------------------

    def training_step(self, batch: dict, batch_idx: int) -> None:
        # Dropout is the one thing that draws from torch's own generator; give it the step's seed.
        place = self.step * self.trainer.world_size + self.global_rank
        seed_generator(self.device, subseed(self.seed, "step", place))
        self.last_lr = self.lr()
        figures, norms = {}, []
        parts = self.split(batch)
        for place, loss in enumerate(self.losses()):
            logs = []
            for i, part in enumerate(parts):
                value, log = loss(part)
                self.backward_part(value, i)
                logs.append(log)
            figures |= mean_figures(logs)
            norms.append(self.update(place))
            figures.setdefault("grad_norm", norms[0])
        bad = ~torch.isfinite(torch.stack(norms)).all()
        self._bad_steps = (self._bad_steps + 1) * bad  # in a row: a good step sets the count back
        if self.ema is not None:
            self.ema.update(~bad)
        self.step += 1
        self._report(figures)

    def split(self, batch: dict) -> list[dict]:
        """The batch in `accumulate` equal parts."""
        count = self.settings.accumulate
        size = len(batch["position"]) // count
        return [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(count)]

    def backward_part(self, loss: Tensor, index: int) -> None:
        """Accumulate the gradient of part `index`; processes exchange gradients at the last one only."""
        count = self.settings.accumulate
        strategy = self.trainer.strategy
        quiet = index < count - 1 and hasattr(strategy, "block_backward_sync")
        # Inside an autocast region, even float32 operations would get gradients in half precision.
        outside = torch.autocast(self.device.type, enabled=False)
        with outside, strategy.block_backward_sync() if quiet else nullcontext():
            self.manual_backward(loss / count)

    def update(self, place: int) -> Tensor:
        """Clip, step unless the gradient is not finite, clear; returns the norm before clipping."""
        optimizer = self._optimizers[place]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_gradients(parameters, self.settings.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = self.last_lr
        # Lightning counts the steps of the optimizers that it hands out: one a training step.
        handed = self.optimizers()
        first = handed[0] if isinstance(handed, list) else handed
        guarded_step(optimizer, norm, first.step if place == 0 else optimizer.step)
        optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def base_lr(self) -> float:
        return base_lr(self.settings.optimizer, self.settings.batch_size)

    def lr(self) -> float:
        return self.base_lr * lr_factor(self.settings.optimizer, self.step, self.settings.steps)

    def configure_optimizers(self) -> list[torch.optim.AdamW]:
        settings = self.settings.optimizer
        self._optimizers = [make_optimizer(p, settings, self.base_lr) for p in self.trained()]
        self._bad_steps = torch.zeros((), device=self.device)
        if self.settings.ema is not None:
            self.ema = EMA(self.model, self.settings.ema)
        if self._pending is not None:
            self._restore(self._pending)
            self._pending = None
        return self._optimizers

    def _report(self, figures: Figures) -> None:
        """Log every few steps: figures, learning rate, images a second (waits for data included)."""
        every, last = self.keys.logging.every, self.step == self.settings.steps
        due = self.step % every == 0 or last
        if due:
            # Before the clock is read: this waits for the device.
            self.figures = {name: float(value) for name, value in self.across_ranks(figures, "mean").items()}
        self._seconds += time.perf_counter() - self.free_since
        self._images += self.settings.batch_size
        if due:
            rate = self._images / max(self._seconds, 1e-9)
            self._seconds, self._images = 0.0, 0
            self.figures |= {"lr": self.last_lr, "images_per_second": rate}
            self.log_figures("train", self.figures)
        if due or self.step % self.settings.max_bad_steps == 0:
            try:
                self.check_finite()
            except Diverged:
                for logger in self.loggers:  # Lightning would after the step, which does not end
                    logger.log_metrics(_named("train", self.figures), self.step)
                raise

    def log_figures(self, stage: str, figures: Mapping[str, float]) -> None:
        """Lightning's `log_dict` under `stage`/name, at the run's own step."""
        values = {**_named(stage, figures), "step": self.step}
        # What is given as a number would be rounded to float32.
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})

    def across_ranks(self, values: Figures, how: str) -> Figures:
        """The mean or sum of 0-d tensors over all processes."""
        if self.trainer.world_size == 1 or not values:
            return values
        stacked = torch.stack([value.float() for value in values.values()])
        return dict(zip(values, self.trainer.strategy.reduce(stacked, reduce_op=how), strict=True))

    def check_finite(self) -> None:
        """Raises `Diverged` after `max_bad_steps` bad steps in a row. Waits for the device."""
        bad = int(self._bad_steps) if self._bad_steps is not None else 0
        if bad >= self.settings.max_bad_steps:
            # Asked for now and then only: there may be more of them than `max_bad_steps`.
            half = getattr(self.trainer, "precision", "32-true") != "32-true"
            raise Diverged(
                f"the gradient was not finite in the last {bad} step{'' if bad == 1 else 's'} (now at step "
                f"{self.step}, training.max_bad_steps is {self.settings.max_bad_steps}); no weight was "
                "changed by them. Lower training.optimizer.lr"
                + (", or set training.precision=32" if half else "")
            )

    def on_fit_start(self) -> None:
        # Our checkpoints hold one integer instead of Lightning's loops: these count on from it, so that the
        # intervals, callbacks and loggers of a resumed run see the run's own steps.
        loop = self.trainer.fit_loop.epoch_loop
        loop.batch_progress.total.ready = self.step
        loop.manual_optimization.optim_step_progress.total.completed = self.step
        loop._batches_that_stepped = self.step

    def on_train_start(self) -> None:
        self.free_since = time.perf_counter()

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:  # called after the callbacks
        self.free_since = time.perf_counter()

    # -- validation ----------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within: averaged weights, eval mode, no gradients, and torch's generator left as it was found."""
        was_training = self.training
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            self.eval()
            try:
                with self.ema.swapped_in() if self.ema is not None else nullcontext():
                    yield
            finally:
                self.train(was_training)

    def on_validation_start(self) -> None:
        self._validation.enter_context(self.evaluating())
        self._sums = {"count": torch.zeros((), device=self.device)}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        # A process whose share is shorter than others' is given batches that count for nothing.
        counts = batch_idx < self.trainer.datamodule.validation_share
        measured = self.validate({**batch, "position": batch["index"]})
        for name, values in measured.items():
            # Not multiplied by 0, which a figure that is not finite would survive.
            share = values.float().sum() if counts else torch.zeros((), device=self.device)
            self._sums[name] = self._sums.get(name, 0) + share
        self._sums["count"] += len(batch["index"]) * counts

    def on_validation_epoch_end(self) -> None:
        sums = self.across_ranks(self._sums, "sum")
        total = float(sums.pop("count"))
        self.log_figures("validation", {name: float(value) / total for name, value in sums.items()})

    def on_validation_end(self) -> None:
        self._validation.close()
        self.free_since = time.perf_counter()

    # -- the state -----------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Everything that the next step depends on, as tensors and plain containers."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "extra": self.extra_state(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "bad_steps": float(self._bad_steps) if self._bad_steps is not None else 0.0,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "data": self.data_identity,
        }

    def resume_from(self, state: Mapping) -> None:
        """Continue from `state()`: weights at once, optimizers when Lightning has made them."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.load_extra_state(state["extra"])
        self._pending = {k: state[k] for k in ("ema", "ema_updates", "optimizers", "bad_steps")}

    def _restore(self, state: Mapping) -> None:
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for parameter, values in optimizer.state.items():
                for name, value in values.items():
                    # Copied: what was read is mapped from the checkpoint's file, which does not stay for
                    # ever. And laid out as the parameter, which the fused kernel takes for granted.
                    like = parameter if value.shape == parameter.shape else value
                    values[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"], state["ema_updates"])
        self._bad_steps.fill_(state["bad_steps"])


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed torch's own generators of the CPU and of `device`.

    `torch.manual_seed` visits every kind of accelerator and, for those that are not in use, keeps a stack
    trace for later: a millisecond, which is much in a small network's step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _named(stage: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{stage}/{name}": value for name, value in figures.items()}


def mean_figures(logs: list[Figures]) -> Figures:
    """Figures of the parts -> their means, detached."""
    return {key: torch.stack([log[key].detach().float().mean() for log in logs]).mean() for key in logs[0]}
