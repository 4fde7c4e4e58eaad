"""Making layers: convolutions and pooling in 1, 2 or 3 dimensions, and layers that start at zero."""

from typing import TypeVar

import torch
from torch import nn

from ldm.wording import check_choice

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over `dims` spatial dimensions (1, 2 or 3; ValueError otherwise)."""
    check_choice("dims", dims, _CONVOLUTIONS)
    return _CONVOLUTIONS[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over `dims` spatial dimensions (1, 2 or 3; ValueError otherwise)."""
    check_choice("dims", dims, _AVERAGE_POOLS)
    return _AVERAGE_POOLS[dims](*args, **kwargs)


@torch.no_grad()
def zero_module(module: ModuleType) -> ModuleType:
    """Zero in every parameter: a residual branch that ends in such a layer starts as the identity."""
    for parameter in module.parameters():
        parameter.zero_()
    return module
