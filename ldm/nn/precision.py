"""Where float32 has to stay float32 under autocast."""

import contextlib

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which sums and logarithms keep float32 whatever precision surrounds it.

    Meta tensors have no values and know no autocast; for them it does nothing.
    """
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
