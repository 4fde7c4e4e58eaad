"""Training objectives: draw a time, mix noise in, call the network, weigh the error.

Every random number is handed in, so a loss is a pure function of its arguments.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.likelihood import variational_bound
from ldm.diffusion.precision import exact, expand, full_precision
from ldm.diffusion.schedule import shift_time


class TimeUniform:
    """Unit time, uniform in (0, 1), moved towards noise by `shift` (see `shift_time`).

    In a training config `shift: auto` is the latents' own, `resolution_shift`.
    """

    def __init__(self, shift: float | Literal["auto"] = 1.0):
        if shift == "auto":
            raise ValueError("shift: auto is for training configs, where the latents' shape fills it in")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift is {shift}, must be a finite number above 0")
        self.shift = shift

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """Uniform u in (0, 1), (B,) -> unit time in (0, 1), float64; increasing in u."""
        return shift_time(exact(u), self.shift)


class TimeLogitNormal(TimeUniform):
    """Unit time sigmoid(N(mean, std^2)), then `shift` (SD3, eq. 19); in sigma this is EDM's log-normal."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float | Literal["auto"] = 1.0):
        super().__init__(shift)
        if not std > 0:
            raise ValueError(f"std is {std}, must be above 0")
        self.mean, self.std = mean, std

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """Uniform u in (0, 1), (B,) -> unit time in (0, 1), float64; increasing in u."""
        return super().__call__(torch.sigmoid(self.mean + self.std * torch.special.ndtri(exact(u))))


class Objective:
    """The error of a network's raw output against its target, one number a sample.

    Args:
        denoiser: schedule and prediction type.
        time: distribution of the unit time; uniform by default.
        loss: `l2` | `l1` | `huber` (quadratic below `huber_delta`), meant over C, H, W.
        weighting: `none` | `min_snr`, which is min(SNR, gamma) on the error of x0, whatever is predicted
            (Hang et al. 2023): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v; or one's own,
            weighting(sigma (B,), denoiser) -> (B,), on the error of what the network gives.
        gamma: of min_snr.
        huber_delta: of huber.
    """

    LOSSES = ("l2", "l1", "huber")
    WEIGHTINGS = ("none", "min_snr")

    def __init__(
        self,
        denoiser: Denoiser,
        time: TimeUniform | None = None,
        loss: str = "l2",
        weighting: str | Callable[[torch.Tensor, Denoiser], torch.Tensor] = "none",
        gamma: float = 5.0,
        huber_delta: float = 1.0,
    ):
        if loss not in self.LOSSES:
            raise ValueError(f"loss is {loss!r}, must be one of {', '.join(self.LOSSES)}")
        if not callable(weighting) and weighting not in self.WEIGHTINGS:
            raise ValueError(f"weighting is {weighting!r}, must be one of {', '.join(self.WEIGHTINGS)}")
        if denoiser.learned_variance and not hasattr(denoiser.schedule, "sigmas_all"):
            raise ValueError("learned_variance is trained on the variational bound of a DiscreteSchedule")
        self.denoiser = denoiser
        self.time = time or TimeUniform()
        self.loss, self.weighting, self.gamma, self.huber_delta = loss, weighting, gamma, huber_delta

    def __call__(
        self,
        network_fn: Callable[..., torch.Tensor],
        x0: torch.Tensor,
        noise: torch.Tensor,
        u: torch.Tensor,
        cond: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss at the noise level that uniform u in (0, 1), (B,), stands for; see `at`."""
        return self.at(network_fn, x0, noise, self.denoiser.schedule.draw(self.time(u)), cond)

    def at(
        self,
        network_fn: Callable[..., torch.Tensor],
        x0: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        cond: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss at given noise levels.

        Args:
            network_fn: network_fn(x_in, t, **cond) -> raw.
            x0, noise: (B, C, H, W); sigma: (B,), best on the CPU (no transfer then waits for the GPU).
            cond: keyword arguments of the network.

        Returns:
            loss (B,), to be averaged and minimised; simple (B,), the unweighted error; t (B,), the network's
            time; sigma (B,); x0_hat like x0. All but the loss are detached. With a learned variance also vb
            (B,), a part of the loss: the bound in bits per dimension, times T / 1000 as in guided-diffusion.
        """
        denoiser = self.denoiser
        x0, noise = full_precision(x0), full_precision(noise)
        x = x0 + expand(sigma, x0) * noise
        x_in, t = denoiser.network_input(x, sigma)
        raw, fraction = denoiser.split(network_fn(x_in, t, **(cond or {})).to(x0.dtype), x0.shape[1])
        simple = self._error(raw, denoiser.target(x0, noise, sigma)).flatten(1).mean(1)
        loss = simple if self.weighting == "none" else simple * expand(self._weight(sigma), simple)
        x0_hat = denoiser.to_x0(raw.detach(), x, sigma)
        result = {"loss": loss, "simple": simple.detach(), "t": t, "sigma": sigma, "x0_hat": x0_hat}
        if fraction is not None:
            schedule = denoiser.schedule
            step = schedule.time(sigma).round().long()
            # The mean is detached: only the variance learns from the bound (improved DDPM, section 3.1).
            bits = variational_bound(schedule, x0, x, step, x0_hat, "learned", fraction)
            vb = bits * schedule.timesteps / 1000
            result |= {"loss": loss + vb, "vb": vb.detach()}
        return result

    def _error(self, raw: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.loss == "l2":
            return (raw - target) ** 2
        if self.loss == "l1":
            return (raw - target).abs()
        return F.huber_loss(raw, target, reduction="none", delta=self.huber_delta)

    def _weight(self, sigma: torch.Tensor) -> torch.Tensor:
        if callable(self.weighting):
            return self.weighting(sigma, self.denoiser)
        # An error of raw is |out| times as large in x0: this weighs x0 whatever is predicted.
        return (exact(sigma) ** -2).clamp(max=self.gamma) * self.denoiser.coefficients(sigma).out ** 2
