"""Small networks with weights that make every layer count, and diffusers where it is installed."""

import warnings

import pytest
import torch
from torch import nn


def require_diffusers():
    """The library, or a skip that says how to get it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", reason='needs diffusers: pip install "ldm-toolkit[test]"')


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with random weights everywhere: no zeroed layer, no norm that does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return module.eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaded_fully(cls: type, folder) -> nn.Module:
    """`cls.from_pretrained`, which only warns about keys that do not fit; here they fail."""
    module, info = cls.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values()), info
    return module.eval()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Equal names, types and bits of all parameters and buffers."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )
