"""Samplers: pure functions f(denoise, x, sigmas, *, noise_fn=None, callback=None, **options) -> x.

    denoise(x, sigma) -> x0      the contract of `ldm.diffusion.denoiser`, with the conditions bound
    x                            (B, ...) at sigmas[0], in the form x0 + sigma * noise
    sigmas                       (S + 1,), strictly decreasing, the last may be 0
    noise_fn(sigma, sigma_next)  the next standard normal tensor like x; called only where noise is needed
    callback(i, x, x0, sigma)    called in step i with what the denoiser made of x

The result is x at sigmas[-1]; above 0, the model's own sample is schedule.scale(sigmas[-1]) times it.
Steps are written in ratios, x' = x0 + (sigma' / sigma) (x - x0), which stay exact where sigma is as good as
infinite and do not depend on how a model scales its samples. Half-precision x is carried in float32.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from ldm.diffusion.denoiser import Denoise, predict
from ldm.diffusion.likelihood import VARIANCES, reverse_variances
from ldm.diffusion.precision import full_precision
from ldm.wording import check_choice


def _steps(sigmas) -> list[tuple[float, float]]:
    """(sigma, sigma_next) of each step as Python floats, so that no step has to wait for the device."""
    values = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").tolist()
    if len(values) < 2 or not all(a > b >= 0 for a, b in pairwise(values)) or math.isinf(values[0]):
        raise ValueError(f"sigmas must be 2 or more, finite, strictly decreasing, not negative: {values}")
    return list(pairwise(values))


def _denoise(denoise: Denoise, x: torch.Tensor, sigma: float, step: int = 0, callback=None):
    """(x0, learned variance's fraction or None) at one sigma for the whole batch, told to the callback."""
    x0, fraction = predict(denoise, x, torch.full((len(x),), sigma, dtype=torch.float64, device="cpu"))
    x0 = x0.to(x.dtype)
    if callback:
        callback(step, x, x0, sigma)
    return x0, fraction


def _noise(noise_fn: Callable | None, sigma: float, sigma_next: float) -> torch.Tensor:
    if noise_fn is None:
        raise ValueError("this sampler adds noise and needs noise_fn(sigma, sigma_next) -> standard normal")
    return noise_fn(sigma, sigma_next)


def _towards(x0: torch.Tensor, x: torch.Tensor, ratio: float) -> torch.Tensor:
    """x0 + ratio (x - x0): where the straight line from x, at sigma, to x0, at 0, is at ratio * sigma."""
    return torch.lerp(x0, x, ratio)


@torch.no_grad()
def euler(denoise: Denoise, x: torch.Tensor, sigmas, *, noise_fn=None, callback=None) -> torch.Tensor:
    """Euler's method on dx/dsigma = (x - x0) / sigma (EDM, Alg. 1 uncorrected); order 1, equals DDIM."""
    x = full_precision(x)
    for i, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        x0, _ = _denoise(denoise, x, sigma, i, callback)
        x = _towards(x0, x, sigma_next / sigma)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoise, x: torch.Tensor, sigmas, *, noise_fn=None, callback=None, eta: float = 0.0
) -> torch.Tensor:
    """DDIM (Song et al. 2021, eqs. 12 and 16): eta 0 is deterministic, eta 1 is DDPM with its small variance.

    Divided by sqrt(a_{t-1}), the equation's sigma_t is eta times the posterior's deviation: no a_t is left.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    x = full_precision(x)
    for i, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        x0, _ = _denoise(denoise, x, sigma, i, callback)
        ratio = sigma_next / sigma
        x = _towards(x0, x, ratio * math.sqrt(1 - eta**2 + (eta * ratio) ** 2))
        if eta > 0 and sigma_next > 0:
            std = eta * math.sqrt(reverse_variances(sigma, sigma_next)[0])
            x = x + std * _noise(noise_fn, sigma, sigma_next).to(x)
    return x


@torch.no_grad()
def ddpm(
    denoise: Denoise, x: torch.Tensor, sigmas, *, noise_fn=None, callback=None, variance: str = "small"
) -> torch.Tensor:
    """Ancestral sampling from q(x_{t-1} | x_t, x0) at the predicted x0 (DDPM, eqs. 6-7, Alg. 2).

    variance: `small`, the posterior's own; `large`, beta_t; `learned`, between the two where the second half
    of the network's channels says (improved DDPM, eq. 15). The last step to sigma 0 adds no noise.
    """
    check_choice("variance", variance, VARIANCES)
    x = full_precision(x)
    for i, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        x0, fraction = _denoise(denoise, x, sigma, i, callback)
        x = _towards(x0, x, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            small, large = reverse_variances(sigma, sigma_next)
            if variance != "learned":
                std = math.sqrt(small if variance == "small" else large)
            elif fraction is None:
                raise ValueError("variance is 'learned', but this denoise function's `predict` gives none")
            else:
                std = small**0.5 * torch.exp(fraction.to(x) * (0.5 * math.log(large / small)))
            x = x + std * _noise(noise_fn, sigma, sigma_next).to(x)
    return x


@torch.no_grad()
def heun(
    denoise: Denoise, x: torch.Tensor, sigmas, *, noise_fn=None, callback=None, flow_time: bool | None = None
) -> torch.Tensor:
    """Heun's method: Euler's step, then the mean of the slopes at both ends (EDM, Alg. 1); order 2.

    The trapezoid is over sigma, or with flow_time over t = sigma / (1 + sigma), which is Heun's method on a
    flow's velocity and the only sensible one from a sigma as good as infinite. None: over t if sigmas start
    at 1000 or above. A last step to sigma 0 is Euler's.
    """
    steps, x = _steps(sigmas), full_precision(x)
    flow_time = steps[0][0] >= 1000 if flow_time is None else flow_time
    for i, (sigma, sigma_next) in enumerate(steps):
        x0, _ = _denoise(denoise, x, sigma, i, callback)
        x = _towards(x0, x, sigma_next / sigma)
        if sigma_next > 0:
            # Half the step times the difference of the slopes, from which x cancels: only the two x0 remain.
            weight = (1 + sigma_next) / (1 + sigma) if flow_time else 1.0
            x0_next, _ = _denoise(denoise, x, sigma_next)
            x = x + 0.5 * (sigma / sigma_next - 1) * weight * (x0_next - x0)
    return x


#: Weights of the newest slope and those before it, by how many there are.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@torch.no_grad()
def plms(
    denoise: Denoise, x: torch.Tensor, sigmas, *, noise_fn=None, callback=None, flow_time: bool | None = None
) -> torch.Tensor:
    """Pseudo linear multistep (Liu et al. 2022, PNDM) as in CompVis/latent-diffusion.

    A first step by improved Euler (two evaluations), then Adams-Bashforth of order 2, 3 and 4 on the noise
    (x - x0) / sigma. With flow_time the slopes are a flow's velocity and the steps are in its t, see `heun`.
    The weights are those of equal steps, whatever the steps are; in a flow's uniform t they are exact.
    """
    steps, x = _steps(sigmas), full_precision(x)
    flow_time = steps[0][0] >= 1000 if flow_time is None else flow_time

    def slope(x, x0, sigma):
        return (x - x0) / sigma - x0 if flow_time else (x - x0) / sigma

    slopes = []  # newest first
    for i, (sigma, sigma_next) in enumerate(steps):
        x0, _ = _denoise(denoise, x, sigma, i, callback)
        slopes = [slope(x, x0, sigma), *slopes[:3]]
        x = _towards(x0, x, sigma_next / sigma)
        if i == 0 and sigma_next > 0:
            x0_next, _ = _denoise(denoise, x, sigma_next)
            mean = (slopes[0] + slope(x, x0_next, sigma_next)) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(slopes) - 1]
            mean = sum(w * s for w, s in zip(weights, slopes, strict=True))
        x = x + (sigma_next - sigma) / (1 + sigma if flow_time else 1.0) * (mean - slopes[0])
    return x


@torch.no_grad()
def dpmpp_2m(denoise: Denoise, x: torch.Tensor, sigmas, *, noise_fn=None, callback=None) -> torch.Tensor:
    """DPM-Solver++(2M): a line through the last two x0 over ln(sigma) (Lu et al. 2022, Alg. 2); order 2.

    The first step and a last step to sigma 0 are of order 1, as in k-diffusion.
    """
    x = full_precision(x)
    x0_before = h_before = None
    for i, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        x0, _ = _denoise(denoise, x, sigma, i, callback)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        ahead = x0
        if x0_before is not None and sigma_next > 0:
            ahead = x0 + 0.5 * h / h_before * (x0 - x0_before)
        x = _towards(ahead, x, sigma_next / sigma)
        x0_before, h_before = x0, h
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "plms": plms, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
