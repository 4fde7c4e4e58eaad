"""One pass of a first stage over a dataset, and the mean and spread of the latents that it gives."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.loading.loader import make_loader
from ldm.data.loading.order import SequentialBatches, permuted

# images (B, C, H, W) in [-1, 1] -> mean and std of their latents (B, c, h, w); std None for "no spread".
MomentsFn = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
Moments = tuple[torch.Tensor, torch.Tensor]
Progress = Callable[[int, int], None]  # images done, images in all


class ChannelStatistics:
    """Mean and spread of each channel of SAMPLED latents z = mean + std * noise, accumulated in float64.

    By the law of total variance var(z) = var(mean) + E[std^2]; no noise has to be drawn. Batches are merged
    by Chan, Golub and LeVeque (1983), who do not cancel as a sum of squares would.
    """

    def __init__(self) -> None:
        self.count = 0  # values a channel
        self._mean = self._m2 = self._spread = torch.zeros((), dtype=torch.float64)  # (c,) from the first on

    def update(self, mean: torch.Tensor, std: torch.Tensor | None = None) -> None:
        """Add a batch of posterior means and standard deviations (B, c, ...)."""
        values = _by_channel(mean)
        count, total = values.shape[1], self.count + values.shape[1]
        batch_mean = values.mean(1)
        batch_m2 = (values - batch_mean[:, None]).square().sum(1)
        delta = batch_mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._m2 = self._m2 + batch_m2 + delta.square() * (self.count * count / total)
        if std is not None:
            self._spread = self._spread + _by_channel(std).square().sum(1)
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


def _by_channel(values: torch.Tensor) -> torch.Tensor:
    """(B, c, ...) -> float64 (c, B * positions) on the CPU."""
    return values.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)


def encoded(
    batches: Iterable[dict], moments_fn: MomentsFn, count: int, flips: bool, progress: Progress | None
) -> Iterator[tuple[dict, list[Moments]]]:
    """Each batch, with `_moments` of its images and, with `flips`, of their mirror images."""
    done = 0
    for batch in batches:
        images = batch["image"]
        views = [images, images.flip(-1)] if flips else [images]
        indices = batch.get("index", torch.arange(done, done + len(images)))
        yield batch, [_moments(moments_fn, view, indices) for view in views]
        done += len(images)
        if progress:
            progress(done, count)


def _moments(moments_fn: MomentsFn, images: torch.Tensor, indices: torch.Tensor) -> Moments:
    """Mean and std, float32 (B, c, h, w) on the CPU; a std of None is 0."""
    mean, std = moments_fn(images)
    mean = mean.detach().float().cpu()
    std = torch.zeros_like(mean) if std is None else std.detach().float().cpu()
    if len(mean) != len(images) or std.shape != mean.shape:
        shapes = f"{tuple(mean.shape)} and {tuple(std.shape)}"
        raise ValueError(f"moments_fn gave {shapes} for {len(images)} images: both must be (B, c, h, w)")
    bad = indices[~(mean.isfinite() & std.isfinite()).flatten(1).all(1)].tolist()
    if bad:
        raise ValueError(f"the first stage gave latents that are not finite for images {bad}")
    return mean, std


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
        moments_fn: called with float32 images on the CPU.
        samples: how many images to look at, spread evenly over the set; None for all.

    Raises:
        ValueError: no images, or latents that are not finite.
    """
    count = len(dataset) if samples is None else min(samples, len(dataset))
    if count < 1:
        raise ValueError(f"measuring needs at least one image, got samples={samples} of {len(dataset)}")
    chosen = np.sort(permuted(np.arange(count), len(dataset), 0, 0))
    loader = make_loader(dataset, SequentialBatches(chosen, batch_size), num_workers, pin_memory=False)
    statistics = ChannelStatistics()
    for _, ((mean, std),) in encoded(loader, moments_fn, count, False, progress):
        statistics.update(mean, std)
    return statistics
