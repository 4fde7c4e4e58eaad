"""Making layers: convolutions and pooling in 1, 2 or 3 dimensions, and layers that start at zero."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def _of_dims(table: dict[int, type[nn.Module]], dims: int) -> Callable[..., nn.Module]:
    if dims not in table:
        raise ValueError(f"dims={dims!r} is not a number of spatial dimensions; allowed: 1, 2, 3")
    return table[dims]


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over `dims` spatial dimensions (1, 2 or 3; ValueError otherwise)."""
    return _of_dims(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over `dims` spatial dimensions (1, 2 or 3; ValueError otherwise)."""
    return _of_dims(_AVERAGE_POOLS, dims)(*args, **kwargs)


@torch.no_grad()
def zero_module(module: ModuleType) -> ModuleType:
    """Set every parameter of `module` to zero and return it.

    A residual branch that ends in such a layer starts as the identity.
    """
    for parameter in module.parameters():
        parameter.zero_()
    return module
