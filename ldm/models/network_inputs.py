"""What a denoising network is called with, held against what it was built for."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def check_inputs(
    network: nn.Module,
    batch: int,
    timesteps: Tensor,
    context: Tensor | Sequence[Tensor] | None,
    y: Tensor | None,
) -> None:
    """Times (B,), context (B, N, context_dim) or a list of such, and `y` as `num_classes` says it enters.

    `network` has `context_dim`, `num_classes` and `adm_in_channels`, see `ldm.models.unet.UNetModel`.

    Raises:
        ValueError: a shape or type that does not fit, or `context` or `y` missing or out of place.
    """
    where, context_dim, num_classes = type(network).__name__, network.context_dim, network.num_classes
    if tuple(timesteps.shape) != (batch,):
        raise ValueError(f"{where}: timesteps has shape {tuple(timesteps.shape)}, expected ({batch},)")
    pairs = ("context", context, "context_dim", context_dim), ("y", y, "num_classes", num_classes)
    for name, value, setting, built_for in pairs:
        if (value is None) != (built_for is None):
            given = "missing" if value is None else "given"
            raise ValueError(f"{where}: {name} is {given}, but {setting} is {built_for!r}")
    if context is not None:
        dims = [context_dim] if isinstance(context_dim, int) else list(context_dim)
        for tokens in [context] if isinstance(context, Tensor) else context:
            if tokens.ndim != 3 or len(tokens) != batch or tokens.shape[2] not in dims:
                expected = f"({batch}, N, {' or '.join(map(str, dict.fromkeys(dims)))})"
                raise ValueError(f"{where}: context has shape {tuple(tokens.shape)}, expected {expected}")
    if y is not None:
        labels = isinstance(num_classes, int)
        shape = (batch, network.adm_in_channels) if num_classes == "sequential" else (batch,)
        shapes = [shape, (batch, 1)] if num_classes == "continuous" else [shape]
        if tuple(y.shape) not in shapes or (labels and y.dtype not in (torch.int32, torch.int64)):
            kind, expected = "int64 or int32" if labels else "numbers", " or ".join(map(str, shapes))
            raise ValueError(
                f"{where}: y is {y.dtype} of shape {tuple(y.shape)}, expected {kind} of shape {expected}"
            )
