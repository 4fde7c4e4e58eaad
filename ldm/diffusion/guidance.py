"""Guidance: denoise functions made of denoise functions."""

import math

import torch

from ldm.diffusion.denoiser import Denoise, predict
from ldm.diffusion.precision import expand


def _pair(cond: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each value of both dicts in one batch, `cond` first."""
    joined = {}
    for key, value in cond.items():
        if value.shape != uncond[key].shape:
            raise ValueError(
                f"condition {key!r} has shape {tuple(value.shape)} with, {tuple(uncond[key].shape)} without"
            )
        joined[key] = torch.cat([value, uncond[key]])
    return joined


class ClassifierFreeGuidance:
    """x0 = c + (scale - 1) (c - u), the conditional c and the unconditional u from one batch.

    Ho & Salimans 2022, eq. 6, whose w is scale - 1; the same in x0, eps or v, as its weights sum to one.

    Args:
        denoise: the denoise function to guide.
        cond, uncond: its conditions with and without what guides; the same keys, tensors of the same shapes.
        scale: 1 is the conditional and 0 the unconditional model; neither pays for the other.
        interval: (low, high): guide where low < sigma <= high only, elsewhere take the conditional model
            (Kynkaanniemi et al. 2024).

    Raises:
        ValueError: keys or shapes differ, the scale is not finite, or the interval is empty.
    """

    def __init__(
        self,
        denoise: Denoise,
        cond: dict[str, torch.Tensor],
        uncond: dict[str, torch.Tensor],
        scale: float,
        interval: tuple[float, float] | None = None,
    ):
        if cond.keys() != uncond.keys():
            raise ValueError(
                f"cond has the keys {sorted(cond)}, uncond {sorted(uncond)}; they must be the same"
            )
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, must be finite")
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError(f"interval is {tuple(interval)}, must be (low, high) with low < high")
        self.denoise, self.cond, self.uncond = denoise, cond, uncond
        self.scale, self.interval = float(scale), interval
        self.both = _pair(cond, uncond)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **shared) -> torch.Tensor:
        return self.predict(x, sigma, **shared)[0]

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, **shared):
        """(guided x0, the conditional model's variance fraction or None); `shared` conditions go to both."""
        sigma = torch.as_tensor(sigma).expand(len(x))
        guided = self._guided(sigma)
        if self.scale == 1 or not guided.any():
            return predict(self.denoise, x, sigma, **shared, **self.cond)
        if self.scale == 0 and guided.all():
            return predict(self.denoise, x, sigma, **shared, **self.uncond)
        x0, fraction = predict(
            self.denoise, torch.cat([x, x]), torch.cat([sigma, sigma]), **_pair(shared, shared), **self.both
        )
        c, u = x0.chunk(2)
        extra = torch.where(guided, self.scale - 1, 0.0)
        return c + expand(extra, x) * (c - u), None if fraction is None else fraction.chunk(2)[0]

    def _guided(self, sigma: torch.Tensor) -> torch.Tensor:
        if self.interval is None:
            return torch.ones_like(sigma, dtype=torch.bool)
        low, high = self.interval
        return (sigma > low) & (sigma <= high)
