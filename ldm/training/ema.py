"""Exponential moving average of the weights, kept beside them and swapped in by a context manager."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages the trainable parameters of a module in float32.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a short run is not an average of its
    noise (the warm-up of TensorFlow's ExponentialMovingAverage, which the original LDM uses too). One fused
    update, no wait for the device.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.averages = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, moved: Tensor | bool = True) -> None:
        """Average in the weights as they are; where `moved` (0-d) is false, the averages stay."""
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach().float() for p in self.parameters]
        if not torch.is_tensor(moved) or moved.device.type == "cpu":
            if moved:
                torch._foreach_lerp_(self.averages, weights, share)
        else:  # decided on the device, which nobody waits for
            torch._foreach_lerp_(self.averages, weights, [share * moved] * len(weights))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over averages; raises ValueError if their names are not those of the module."""
        if set(state) != set(self.names):
            raise ValueError(f"EMA weights do not fit: {sorted(set(state) ^ set(self.names))[:5]} differ")
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])
        self.updates = updates

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within, the module has the averages for weights; afterwards, also after an exception, its own.

        They change places tensor by tensor, so it takes the memory of the largest one; of weights in half
        precision, which cannot hold an average, their own.
        """
        kept = self._swap({})
        try:
            yield
        finally:
            self._swap(kept)

    @torch.no_grad()
    def _swap(self, kept: dict[int, Tensor]) -> dict[int, Tensor]:
        """Exchange weights and averages; returns the weights that the averages' place cannot take."""
        found = {}
        for i, (parameter, average) in enumerate(zip(self.parameters, self.averages, strict=True)):
            weight = parameter.data
            if i in kept:
                weight.copy_(kept[i])
            elif weight.dtype == average.dtype:
                before = weight.clone()
                weight.copy_(average)
                average.copy_(before)
            else:
                found[i] = weight.clone()
                weight.copy_(average)
        return found
