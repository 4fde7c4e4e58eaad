"""What both stages of training share: parts of a batch, the optimizer step, the step counter, the state."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.diffusion.random import subseed
from ldm.training.ema import EMA
from ldm.training.optimization import base_lr, clip_gradients, guarded_step, lr_factor, make_optimizer
from ldm.training.settings import TrainingSettings


class Diverged(ValueError):
    """The gradient stayed infinite or not a number."""


class Task(pl.LightningModule):
    """One stage of training. A Lightning batch is one optimizer step's share of this device.

    A subclass implements `optimized` (the parameters of each optimizer), `update(batch) -> logs` (one step),
    `measure(batch) -> {name: (B,) tensor}` (validation) and `latent_shape(batch)`. What a step draws is
    addressed by (seed, position of the sample in the run), so it depends on nothing that ran before it.
    """

    #: What the moving average covers.
    averaged: nn.Module
    #: The figures that the progress bar has room for.
    shown: tuple[str, ...] = ("loss",)

    def __init__(self, settings: TrainingSettings, seed: int):
        super().__init__()
        self.automatic_optimization = False
        self.settings, self.seed = settings, seed
        self.step = 0
        self.last_lr = 0.0
        self.logs: dict[str, Tensor] = {}
        self.free_since = 0.0  # when the last step and all that followed it was over, by perf_counter
        self.ema: EMA | None = None
        self._norms: list[Tensor] = []  # of this step's gradients, one an optimizer
        self._bad_steps: Tensor | None = None
        self._optimizers: list[torch.optim.AdamW] = []
        self._pending: dict | None = None

    # -- to be implemented -------------------------------------------------------------------------------

    def optimized(self) -> list[list[nn.Parameter]]:
        raise NotImplementedError

    def update(self, batch: dict) -> dict[str, Tensor]:
        raise NotImplementedError

    def measure(self, batch: dict) -> dict[str, Tensor]:
        raise NotImplementedError

    # -- the step ----------------------------------------------------------------------------------------

    def configure_optimizers(self):
        lr = base_lr(self.settings.optimizer, self.settings.batch_size)
        self._optimizers = [make_optimizer(p, self.settings.optimizer, lr) for p in self.optimized()]
        self._bad_steps = torch.zeros((), device=self.device)
        if self.settings.ema is not None:
            self.ema = EMA(self.averaged, self.settings.ema)
        if self._pending is not None:
            self._restore(self._pending)
            self._pending = None
        return self._optimizers

    def training_step(self, batch: dict, batch_idx: int) -> None:
        # Dropout is the one thing that draws from torch's own generator; give it the step's seed.
        seed_generator(
            self.device, subseed(self.seed, "step", self.step * self.trainer.world_size + self.global_rank)
        )
        self.last_lr = self.lr()
        self._norms = []
        self.logs = self.update(batch)
        bad = ~torch.isfinite(torch.stack(self._norms)).all()
        self._bad_steps = (self._bad_steps + 1) * bad  # in a row: a good step sets the count back
        if self.ema is not None:
            self.ema.update()
        self.step += 1

    def on_train_start(self) -> None:
        self.free_since = time.perf_counter()

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:  # called after the callbacks
        self.free_since = time.perf_counter()

    def lr(self) -> float:
        settings = self.settings
        factor = lr_factor(settings.optimizer, self.step, settings.steps)
        return base_lr(settings.optimizer, settings.batch_size) * factor

    def parts(self, batch: dict) -> list[dict]:
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

    def optimizer_step(self, index: int) -> Tensor:
        """Clip, step unless the gradient is not finite, clear; returns the norm before clipping."""
        optimizer = self._optimizers[index]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_gradients(parameters, self.settings.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = self.last_lr
        guarded_step(optimizer, norm)
        optimizer.zero_grad(set_to_none=True)
        self._norms.append(norm)
        return norm

    def check_finite(self) -> None:
        """Raises `Diverged` after `max_bad_steps` bad steps in a row. Waits for the device."""
        bad = int(self._bad_steps) if self._bad_steps is not None else 0
        if bad >= self.settings.max_bad_steps:
            # Asked for now and then only: there may be more of them than `max_bad_steps`.
            half = getattr(self._trainer, "precision", "32-true") != "32-true"
            raise Diverged(
                f"the gradient was not finite in the last {bad} step{'' if bad == 1 else 's'} (now at step "
                f"{self.step}, training.max_bad_steps is {self.settings.max_bad_steps}); no weight was "
                "changed by them. Lower training.optimizer.lr"
                + (", or set training.precision=32" if half else "")
            )

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

    # -- the state ---------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Tensor]:
        """Trained tensors that are not part of the model (a discriminator, say)."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"unexpected extra state: {sorted(state)[:5]}")

    def state(self) -> dict:
        """Everything that the next step depends on, as tensors and plain containers."""
        return {
            "step": self.step,
            "model": self.averaged.state_dict(),
            "extra": self.extra_state(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "bad_steps": float(self._bad_steps) if self._bad_steps is not None else 0.0,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def resume_from(self, state: Mapping) -> None:
        """Continue from `state()`: weights at once, optimizers when Lightning has made them."""
        self.step = state["step"]
        self.averaged.load_state_dict(state["model"])
        self.load_extra_state(state["extra"])
        self._pending = {k: state[k] for k in ("ema", "ema_updates", "optimizers", "bad_steps")}

    def _restore(self, state: Mapping) -> None:
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            # Copied: what was read is mapped from the checkpoint's file, which does not stay for ever.
            optimizer.load_state_dict(copy.deepcopy(saved))
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


def mean_logs(logs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Per-part logs -> their means, detached."""
    return {key: torch.stack([log[key].detach().float().mean() for log in logs]).mean() for key in logs[0]}
