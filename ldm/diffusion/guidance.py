"""Guidance: denoise functions made of denoise functions."""

import math
from collections.abc import Callable

import torch

from ldm.diffusion.denoiser import Denoise, DenoiseFunction, Denoiser, predict
from ldm.diffusion.precision import exact, expand


class _Guidance(DenoiseFunction):
    def __init__(self, denoise: Denoise, scale: float, interval: tuple[float, float] | None):
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, must be finite")
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError(f"interval is {tuple(interval)}, must be (low, high) with low < high")
        self.denoise, self.scale, self.interval = denoise, float(scale), interval

    def _guided(self, sigma: torch.Tensor) -> torch.Tensor:
        """Which samples are guided at their sigma: all, or those where low < sigma <= high."""
        low, high = self.interval or (-math.inf, math.inf)
        return (sigma > low) & (sigma <= high)


def _pair(cond: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each value of both dicts in one batch, `cond` first."""
    joined = {}
    for key, value in cond.items():
        if value.shape != uncond[key].shape:
            other = tuple(uncond[key].shape)
            raise ValueError(f"condition {key!r} has shape {tuple(value.shape)} with, {other} without")
        joined[key] = torch.cat([value, uncond[key]])
    return joined


class ClassifierFreeGuidance(_Guidance):
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
            raise ValueError(f"cond has the keys {sorted(cond)}, uncond {sorted(uncond)}")
        super().__init__(denoise, scale, interval)
        self.cond, self.uncond, self.both = cond, uncond, _pair(cond, uncond)

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


class ClassifierGuidance(_Guidance):
    """x0 + scale sigma^2 grad_x log p(y | x): a denoise function that a classifier steers to classes y.

    Since grad log p(x | y) = grad log p(x) + grad log p(y | x), and x0 = x + sigma^2 grad log p(x). In DDIM
    it is algorithm 2 of Dhariwal & Nichol 2021 (https://arxiv.org/abs/2105.05233).

    Args:
        denoise: the denoise function to guide; its network needs to know nothing of classes.
        classifier: gives logits (B, classes). With a `denoiser`, classifier(x_in, t) of noisy images, scaled
            and timed as that denoiser does for networks (`EncoderUNetModel`, ADM's). Without, classifier(x0)
            of clean images (`VisionTransformer`): it judges the denoised x0, and the gradient goes through
            `denoise`, which costs a backward pass of the network (as in Bansal et al. 2023,
            https://arxiv.org/abs/2302.07121, eq. 6). For a model of latents, one that decodes them first.
        labels: (B,) integers, the class that each sample shall have.
        scale: of the gradient; 1 is Bayes' rule, more insists on the class.
        denoiser: of a classifier of noisy images.
        interval: (low, high): guide where low < sigma <= high only. Where next to nothing is left of the
            image, a classifier's small mistakes weigh sigma^2: leave these levels out.

    Raises:
        ValueError: labels that are not (B,) integers, a scale that is not finite, an empty interval; when
            called, another number of samples than labels, or logits of another shape.
    """

    def __init__(
        self,
        denoise: Denoise,
        classifier: Callable[..., torch.Tensor],
        labels: torch.Tensor,
        scale: float = 1.0,
        denoiser: Denoiser | None = None,
        interval: tuple[float, float] | None = None,
    ):
        super().__init__(denoise, scale, interval)
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}, not integers (B,)")
        self.classifier, self.labels, self.denoiser = classifier, labels, denoiser

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, **cond):
        """(guided x0, the denoise function's variance fraction or None)."""
        sigma = exact(sigma).expand(len(x))
        guided = self._guided(sigma)
        if self.scale == 0 or not guided.any():
            return predict(self.denoise, x, sigma, **cond)
        if len(self.labels) != len(x):
            raise ValueError(f"there are {len(self.labels)} labels for {len(x)} samples")
        if self.denoiser is not None:
            x0, fraction = predict(self.denoise, x, sigma, **cond)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            if self.denoiser is not None:
                judged = self.denoiser.network_input(point, sigma)
            else:
                x0, fraction = predict(self.denoise, point, sigma, **cond)
                judged = (x0,)
            (gradient,) = torch.autograd.grad(self._log_probability(*judged), point)
        weight = torch.where(guided, self.scale * sigma**2, 0.0)
        x0, fraction = x0.detach(), None if fraction is None else fraction.detach()
        return x0 + expand(weight, x) * gradient, fraction

    def _log_probability(self, *judged: torch.Tensor) -> torch.Tensor:
        """Sum over the samples of log p(their label); each sample's gradient is its own."""
        logits = self.classifier(*judged)
        if logits.ndim != 2 or len(logits) != len(self.labels):
            raise ValueError(f"the classifier gives {tuple(logits.shape)} for {len(self.labels)} samples")
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
        return log_p.gather(1, self.labels.to(log_p.device)[:, None].long()).sum()
