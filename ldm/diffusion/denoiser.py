"""A network and its prediction type as denoise(x, sigma, **cond) -> x0, for x = x0 + sigma * noise.

`sigma` has shape (B,). Samplers hand it over in float64 on the CPU, so that tables are read exactly and
decisions cost no wait for the GPU; `precision.expand` brings such a value to an image.

A denoise function may also have a method `predict(x, sigma, **cond) -> (x0, fraction)`. The fraction says
where a learned variance lies between its bounds, or is None; of the samplers only `ddpm` reads it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ldm.arguments import remembers_arguments
from ldm.diffusion.precision import exact, expand
from ldm.wording import check_choice

Denoise = Callable[..., torch.Tensor]


class Coefficients(NamedTuple):
    """x0 = skip * x + out * raw, and the network's target x0_part * x0 + noise_part * noise."""

    skip: torch.Tensor
    out: torch.Tensor
    x0_part: torch.Tensor
    noise_part: torch.Tensor


def _eps(s, sigma_data):
    return torch.ones_like(s), -s, torch.zeros_like(s), torch.ones_like(s)  # DDPM, eq. 11


def _v(s, sigma_data):
    # v = cos(phi) noise - sin(phi) x0 with tan(phi) = sigma (Salimans & Ho 2022, appendix D)
    norm = (1 + s**2).sqrt()
    return norm**-2, -s / norm, -s / norm, 1 / norm


def _x0(s, sigma_data):
    return torch.zeros_like(s), torch.ones_like(s), torch.ones_like(s), torch.zeros_like(s)


def _flow(s, sigma_data):
    return 1 / (1 + s), -s / (1 + s), -torch.ones_like(s), torch.ones_like(s)  # v = noise - x0 (SD3, eq. 13)


def _edm(s, sigma_data):
    norm = (s**2 + sigma_data**2).sqrt()  # c_skip and c_out of EDM, table 1
    return (sigma_data / norm) ** 2, s * sigma_data / norm, s / (sigma_data * norm), -sigma_data / norm


PREDICTIONS = {"eps": _eps, "v": _v, "x0": _x0, "flow": _flow, "edm": _edm}


def predict(denoise: Denoise, x: torch.Tensor, sigma: torch.Tensor, **cond):
    """(x0, variance fraction or None) of any denoise function."""
    if hasattr(denoise, "predict"):
        return denoise.predict(x, sigma, **cond)
    return denoise(x, sigma, **cond), None


@remembers_arguments
class Denoiser:
    """What a network of a given prediction type means. No parameters, no state.

    Args:
        schedule: a schedule of `ldm.diffusion.schedule`.
        prediction: `eps` the noise; `v` cos(phi) noise - sin(phi) x0 with tan(phi) = sigma; `x0`; `flow`
            noise - x0; `edm` the network F that EDM preconditions, fed x / sqrt(sigma^2 + sigma_data^2).
        learned_variance: the network has 2C output channels; the second half says where the reverse variance
            lies between its bounds (improved DDPM, eq. 15).
        sigma_data: standard deviation of the data, for `edm` only.

    Raises:
        ValueError: an unknown prediction, or `eps` with a schedule of zero terminal SNR.
    """

    def __init__(
        self, schedule, prediction: str = "eps", learned_variance: bool = False, sigma_data: float = 0.5
    ):
        check_choice("prediction", prediction, PREDICTIONS)
        if prediction == "eps" and getattr(schedule, "zero_terminal_snr", False):
            raise ValueError("prediction eps says nothing about x0 at zero_terminal_snr; use v, x0 or flow")
        self.schedule, self.prediction = schedule, prediction
        self.learned_variance, self.sigma_data = learned_variance, sigma_data

    def coefficients(self, sigma) -> Coefficients:
        """The four coefficients at sigma, float64."""
        return Coefficients(*PREDICTIONS[self.prediction](exact(sigma), self.sigma_data))

    def to_x0(self, raw: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The x0 that the network's output `raw` means at x = x0 + sigma * noise; (B, C, H, W) like x."""
        skip, out, _, _ = self.coefficients(sigma)
        return expand(skip, x) * x + expand(out, x) * raw

    def target(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the network should say: the raw for which `to_x0` gives x0."""
        _, _, x0_part, noise_part = self.coefficients(sigma)
        return expand(x0_part, x0) * x0 + expand(noise_part, x0) * noise

    def network_input(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scaled x, network time (B,)) for x = x0 + sigma * noise; the time is a float even if whole."""
        if self.prediction == "edm":
            scale = (exact(sigma) ** 2 + self.sigma_data**2).rsqrt()
        else:
            scale = self.schedule.scale(sigma)
        time = expand(self.schedule.time(sigma), x).flatten()
        return expand(scale, x) * x, time.expand(len(x))

    def split(self, raw: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A network's output as (raw, fraction): of `channels` each, the fraction None where none is learned;
        ValueError for another number of channels."""
        expected = channels * (2 if self.learned_variance else 1)
        if raw.shape[1] != expected:
            raise ValueError(
                f"the network returns {raw.shape[1]} channels for {channels}; learned_variance="
                f"{self.learned_variance} needs {expected}"
            )
        if not self.learned_variance:
            return raw, None
        raw, fraction = raw.split(channels, dim=1)
        return raw, (fraction + 1) / 2

    def bind(self, network_fn: Callable[..., torch.Tensor]) -> "BoundDenoiser":
        """The denoise function of network_fn(x_in, t, **cond) -> raw."""
        return BoundDenoiser(self, network_fn)


class DenoiseFunction:
    """Base of denoise functions that have a method `predict`."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **cond) -> torch.Tensor:
        return self.predict(x, sigma, **cond)[0]


class BoundDenoiser(DenoiseFunction):
    """denoise(x, sigma, **cond) -> x0 of a `Denoiser` and a network function."""

    def __init__(self, denoiser: Denoiser, network_fn: Callable[..., torch.Tensor]):
        self.denoiser, self.network_fn = denoiser, network_fn

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, **cond):
        """(x0, learned variance's fraction or None)."""
        raw = self.network_fn(*self.denoiser.network_input(x, sigma), **cond).to(x.dtype)
        raw, fraction = self.denoiser.split(raw, x.shape[1])
        return self.denoiser.to_x0(raw, x, sigma), fraction


class Clipped(DenoiseFunction):
    """A denoise function whose x0 is clamped to [low, high] (`clip_denoised` of DDPM and ADM)."""

    def __init__(self, denoise: Denoise, low: float = -1.0, high: float = 1.0):
        if not low < high:
            raise ValueError(f"cannot clamp to [{low}, {high}]")
        self.denoise, self.low, self.high = denoise, low, high

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, **cond):
        """(clamped x0, learned variance's fraction or None)."""
        x0, fraction = predict(self.denoise, x, sigma, **cond)
        return x0.clamp(self.low, self.high), fraction
