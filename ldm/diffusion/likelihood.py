"""Reverse steps and the variational bound of discrete diffusion (DDPM, section 2; improved DDPM, section 3).

A reverse step goes from sigma to sigma_next < sigma. Its Gaussian is said for x = x0 + sigma * noise; on the
model's own scale mean and standard deviation are schedule.scale(sigma_next) times that, which changes no KL.
"""

import math

import torch

from ldm.diffusion.denoiser import Denoise, predict
from ldm.diffusion.precision import expand
from ldm.wording import check_choice

VARIANCES = ("small", "large", "learned")


def reverse_variances(sigma, sigma_next):
    """(small, large) variance of the step from sigma to sigma_next, numbers or tensors.

    small is the variance of q(x_{t-1} | x_t, x0) (DDPM, eq. 7), large is beta_t; both divided by
    alphas_cumprod_{t-1}, because x is x0 + sigma * noise.
    """
    lost = (sigma - sigma_next) * (sigma + sigma_next)
    return sigma_next**2 * lost / sigma**2, (1 + sigma_next**2) * lost / (1 + sigma**2)


def step_log_variances(schedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(small, large) log variance of the steps at timesteps t (B,), float64.

    The last step, t = 0, has small variance 0; it borrows the model's own of t = 1, as in DDPM's code.
    """
    sigma, sigma_next = step_sigmas(schedule, t)
    small, large = reverse_variances(sigma, sigma_next)
    first, second = schedule.sigmas_all[:2].to(t.device)
    borrowed = reverse_variances(second, first)[0] * schedule.scale(first) ** 2
    return torch.where(t == 0, borrowed, small).log(), large.log()


def step_sigmas(schedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigma, sigma_next) of the steps from timesteps t (B,) int64 to t - 1; sigma_next is 0 at t = 0."""
    table = torch.cat([schedule.sigmas_all.new_zeros(1), schedule.sigmas_all]).to(t.device)
    return table[t + 1], table[t]


def reverse_step(
    denoise: Denoise, schedule, x: torch.Tensor, t: torch.Tensor, variance: str = "small", **cond
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, log variance, x0) of p(x_{t-1} | x_t), each like x, at timesteps t (B,) int64.

    variance: see `gaussian_step`; `learned` asks for a denoise function with a learned variance.
    """
    sigma, _ = step_sigmas(schedule, t)
    x0, fraction = predict(denoise, x, sigma, **cond)
    return *gaussian_step(schedule, x, x0, t, variance, fraction), x0


def gaussian_step(
    schedule, x: torch.Tensor, x0: torch.Tensor, t: torch.Tensor, variance: str = "small", fraction=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, log variance) of x_{t-1} given x_t and x0 (DDPM, eq. 7), both like x.

    variance: `small` | `large` | `learned`, at `fraction` between them in the log (improved DDPM, eq. 15). At
    t = 0 `large` borrows the small variance of t = 1, as in DDPM's code.
    """
    check_choice("variance", variance, VARIANCES)
    sigma, sigma_next = step_sigmas(schedule, t)
    small, large = step_log_variances(schedule, t)
    mean = torch.lerp(x0, x, expand((sigma_next / sigma) ** 2, x))
    if variance == "learned":
        if fraction is None:
            raise ValueError("variance is 'learned', but no fraction was learned (learned_variance=False)")
        small, large = expand(small, x), expand(large, x)
        return mean, small + fraction * (large - small)
    log_variance = small if variance == "small" else torch.where(t == 0, small, large)
    return mean, expand(log_variance, x).expand_as(x)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2) -> torch.Tensor:
    """KL(N1 || N2) elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_gaussian_nll(
    x0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """-log of the Gaussian's mass in the 1/255-wide half-bins around x0 in [-1, 1], in nats (DDPM, eq. 13).

    The outermost bins reach to infinity. Mass is at least 1e-12.
    """
    std = (0.5 * log_variance).exp()
    above = torch.special.ndtr((x0 + 1 / 255 - mean) / std)
    below = torch.special.ndtr((x0 - 1 / 255 - mean) / std)
    above = torch.where(x0 > 0.999, torch.ones_like(above), above)
    below = torch.where(x0 < -0.999, torch.zeros_like(below), below)
    return -(above - below).clamp(min=1e-12).log()


def variational_bound(
    schedule,
    x_start: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    x0: torch.Tensor,
    variance: str = "small",
    fraction: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bound's term of step t in bits per dimension, (B,) (DDPM, eq. 5).

    That is the KL of the predicted from the true reverse step, and at t = 0 the discretized likelihood.

    Args:
        x_start: the image; x: x_start + sigma_t * noise; t: (B,) int64; x0: the prediction at x.
        variance, fraction: the predicted step's, see `gaussian_step`.
    """
    true_mean, true_log_variance = gaussian_step(schedule, x, x_start, t)
    mean, log_variance = gaussian_step(schedule, x, x0, t, variance, fraction)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
    nll = discretized_gaussian_nll(x_start, mean, log_variance).flatten(1).mean(1)
    return torch.where(t.to(x.device) == 0, nll, kl) / math.log(2)


def prior_bound(schedule, x_start: torch.Tensor) -> torch.Tensor:
    """KL of q(x_T | x_start) from a standard normal in bits per dimension, (B,)."""
    kept = schedule.alphas_cumprod[-1].item()
    variance = torch.full_like(x_start, 1 - kept, dtype=torch.float64)
    zero = torch.zeros_like(variance)
    kl = gaussian_kl(kept**0.5 * x_start.double(), variance.log(), zero, zero)
    return (kl.flatten(1).mean(1) / math.log(2)).to(x_start.dtype)
