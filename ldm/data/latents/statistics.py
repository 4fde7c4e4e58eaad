"""Per-channel mean and standard deviation of latents, in one pass."""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.loading.loader import make_loader
from ldm.data.loading.order import SequentialBatches, permuted

# images (B, C, H, W) in [-1, 1] -> mean and std of their latents (B, c, h, w); std may be None for "no
# spread".
MomentsFn = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
Progress = Callable[[int, int], None]


class ChannelStatistics:
    """Mean and spread of each channel of SAMPLED latents z = mean + std * noise, accumulated in float64.

    By the law of total variance var(z) = var(mean) + E[std^2]; no noise has to be drawn. Batches are merged
    with the pairwise formula of Chan, Golub and LeVeque (1983), which does not cancel as a sum of squares
    would.
    """

    def __init__(self) -> None:
        self.count = 0  # values a channel
        self._mean = self._m2 = self._spread = torch.zeros(0, dtype=torch.float64)  # (c,)

    def update(self, mean: torch.Tensor, std: torch.Tensor | None = None) -> None:
        """Add a batch of posterior means and standard deviations (B, c, ...)."""
        values = mean.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)  # (c, B * positions)
        count = values.shape[1]
        batch_mean = values.mean(1)
        batch_m2 = (values - batch_mean[:, None]).square().sum(1)
        spread = torch.zeros_like(batch_mean)
        if std is not None:
            spread = std.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1).square().sum(1)
        if self.count == 0:
            self.count, self._mean, self._m2, self._spread = count, batch_mean, batch_m2, spread
            return
        total = self.count + count
        delta = batch_mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._m2 = self._m2 + batch_m2 + delta.square() * (self.count * count / total)
        self._spread = self._spread + spread
        self.count = total

    @property
    def mean(self) -> torch.Tensor:
        """float64 (c,)."""
        self._check()
        return self._mean

    @property
    def std(self) -> torch.Tensor:
        """float64 (c,), the population's standard deviation of sampled latents."""
        self._check()
        return ((self._m2 + self._spread) / self.count).sqrt()

    def _check(self) -> None:
        if self.count == 0:
            raise ValueError("no latents have been counted")


def measure_latents(
    dataset: Dataset,
    moments_fn: MomentsFn,
    samples: int | None = None,
    batch_size: int = 32,
    num_workers: int | str = "auto",
    progress: Progress | None = None,
) -> ChannelStatistics:
    """Statistics of a dataset's latents without a cache, from the plain view of its images.

    Args:
        dataset: samples have an "image".
        moments_fn: see `MomentsFn`; called with float32 images on the CPU.
        samples: how many images to look at, spread evenly over the set; None for all.
        progress: called with (images done, images in all).
    """
    count = len(dataset) if samples is None else min(samples, len(dataset))
    if count < 1:
        raise ValueError(
            f"measuring latents needs at least one image, got samples={samples} of {len(dataset)}"
        )
    chosen = permuted(np.arange(count), len(dataset), 0, 0)
    statistics = ChannelStatistics()
    done = 0
    for batch in make_loader(
        dataset, SequentialBatches(np.sort(chosen), batch_size), num_workers, pin_memory=False
    ):
        statistics.update(*moments_fn(batch["image"]))
        done += len(batch["image"])
        if progress is not None:
            progress(done, count)
    return statistics
