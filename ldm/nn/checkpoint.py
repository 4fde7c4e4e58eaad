"""Activation checkpointing: recompute in the backward pass instead of storing."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.utils.checkpoint

Result = TypeVar("Result")


def checkpoint(function: Callable[..., Result], inputs: Sequence[object], enabled: bool) -> Result:
    """`function(*inputs)`, its activations thrown away and computed again in the backward pass.

    Parameters that `function` closes over (a bound method's module) receive their gradients too, the
    autocast state of the forward pass is restored for the second run, and so is the state of the random
    generators, so that dropout draws the same masks: gradients equal those without checkpointing.

    Args:
        function: pure but for its parameters; returns a tensor or a structure of tensors.
        inputs: positional arguments; entries that are not tensors (None) pass through.
        enabled: False, or a surrounding `torch.no_grad()`, calls `function` directly.
    """
    if not (enabled and torch.is_grad_enabled()):
        return function(*inputs)
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=True)
