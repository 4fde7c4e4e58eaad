"""Optimizer, learning rate and clipping: each a pure function of the settings and the step."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ldm.training.settings import OptimizerSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings, lr: float) -> AdamW:
    """AdamW with one fused kernel a step."""
    return AdamW(
        [p for p in parameters if p.requires_grad],
        lr=lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def base_lr(settings: OptimizerSettings, batch_size: int) -> float:
    return settings.lr * batch_size if settings.scale_lr else settings.lr


def lr_factor(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The share of the learning rate at `step` (0 .. steps - 1): linear warm-up, then the chosen decay."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.decay == "constant":
        return 1.0
    progress = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if settings.decay == "cosine" else 1 - progress
    return settings.final_lr + (1 - settings.final_lr) * shape


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients to a norm of at most `limit`; returns the norm before, 0-d, not waited for."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient: the loss does not depend on what is trained")
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if limit is not None:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def guarded_step(optimizer: AdamW, norm: Tensor, step: Callable[[], object] | None = None) -> None:
    """Step, unless the gradient's norm is not finite: then nothing changes, decided on the device.

    `step` is what to call in the place of `optimizer.step`, for a wrapper of it.

    The fused kernel leaves parameters and moments alone where `found_inf` is 1, which is how gradient scalers
    skip a step without asking the CPU.
    """
    optimizer.found_inf = (~torch.isfinite(norm)).float()
    optimizer.grad_scale = None
    try:
        (step or optimizer.step)()
    finally:
        del optimizer.found_inf, optimizer.grad_scale
