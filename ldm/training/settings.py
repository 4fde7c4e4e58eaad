"""The plain sections of a training config, with their defaults. Each field is a key of the YAML."""

import math
from dataclasses import dataclass, field
from typing import Literal


def positive(**values) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")


def not_negative(**values) -> None:
    for name, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number, not negative, got {value}")


def interval(**values) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be a number of steps from 1 on, or null for none, got {value}")


def one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass
class OptimizerSettings:
    """AdamW and the learning rate over the steps of a run.

    lr: learning rate, exactly as used; nothing scales it unless `scale_lr` says so.
    scale_lr: multiply lr by the global batch size, as CompVis/latent-diffusion does without asking.
    betas, eps, weight_decay: of AdamW.
    warmup: steps over which lr rises linearly, from lr / warmup in the first to lr in the last of them.
    decay: shape after the warm-up, down to `final_lr` times lr where the run ends (at step `steps`, the first
        that is not taken).
    clip: largest allowed norm of the gradient, None for no clipping.
    """

    lr: float = 1e-4
    scale_lr: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_lr: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self):
        positive(lr=self.lr, eps=self.eps, clip=self.clip)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        not_negative(warmup=self.warmup, weight_decay=self.weight_decay)
        one_of("decay", self.decay, ("constant", "cosine", "linear"))
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is a share of lr in [0, 1], got {self.final_lr}")


@dataclass
class TrainingSettings:
    """How long and on what a run trains.

    steps: optimizer steps in all.
    batch_size: images in one optimizer step, over all devices and all accumulation steps together.
    accumulate: parts in which a device works through its share of the batch, to save memory.
    precision: `32`, or `bf16` for autocast over float32 weights; `auto` is bf16 on a GPU that has it,
        else 32.
    ema: decay of the weights' moving average (its start is gentler: min(ema, (1 + n) / (10 + n))); None for
        none.
    devices: number of devices, or `auto`: all GPUs, or the one CPU.
    accelerator: `auto`, `gpu` or `cpu`.
    compile: compile the networks' repeated blocks with torch.compile.
    workers: data-loading processes a device, or `auto`.
    checkpoint_every: steps between checkpoints; None writes one at the end only.
    keep: how many checkpoints stay.
    max_bad_steps: after so many steps in a row with a gradient that is not finite the run stops with an
        error. Such a step changes no weight.
    """

    steps: int = 100_000
    batch_size: int = 16
    accumulate: int = 1
    precision: Literal["auto", "32", "bf16"] = "auto"
    ema: float | None = 0.9999
    devices: int | Literal["auto"] = "auto"
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    compile: bool = False
    workers: int | Literal["auto"] = "auto"
    checkpoint_every: int | None = 1000
    keep: int = 2
    max_bad_steps: int = 20
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self):
        positive(
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            keep=self.keep,
            max_bad_steps=self.max_bad_steps,
        )
        interval(checkpoint_every=self.checkpoint_every)
        self.precision = str(self.precision)
        one_of("precision", self.precision, ("auto", "32", "bf16"))
        one_of("accelerator", self.accelerator, ("auto", "gpu", "cpu"))
        if self.devices != "auto":
            positive(devices=self.devices)
        if self.workers != "auto":
            not_negative(workers=self.workers)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay in [0, 1), got {self.ema}")


@dataclass
class LoggingSettings:
    """What a run writes beside its weights.

    every: steps between lines of `logs/train.csv`.
    images_every: steps between grids in `images/`; None for none.
    images: how many images a grid shows.
    validate_every: steps between passes over the validation data; None for none.
    validation_batches: most batches of one such pass; None for all.
    tensorboard: also write TensorBoard events, if it is installed.
    progress: show a progress bar, or a line now and then where stderr is no terminal.
    """

    every: int = 10
    images_every: int | None = 1000
    images: int = 8
    validate_every: int | None = 1000
    validation_batches: int | None = 20
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self):
        positive(every=self.every, images=self.images, validation_batches=self.validation_batches)
        interval(images_every=self.images_every, validate_every=self.validate_every)
