"""Activation checkpointing: recompute in the backward pass instead of storing."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.utils.checkpoint

Result = TypeVar("Result")


def checkpoint(function: Callable[..., Result], inputs: Sequence[object], enabled: bool) -> Result:
    """`function(*inputs)`, its activations thrown away and computed again in the backward pass.

    Autocast and the random generators are restored for the second run, so that dropout draws the same masks:
    gradients equal those without. Not `enabled`, or without gradients, it calls `function` directly.
    """
    if not (enabled and torch.is_grad_enabled()):
        return function(*inputs)
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=True)
