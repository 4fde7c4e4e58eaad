"""Noise levels: from timesteps and unit times to sigma and back.

Everything is said in the form x = x0 + sigma * noise. A schedule knows four things: how a model's own time
maps to sigma (`sigma`, `time`), how a model scales its samples (`scale`), where training draws sigma
(`draw`), and which sigmas a sampler walks (`sigmas`). Tables are float64 and live on the CPU; results are
float64, on the device of what was given, and are cast where they meet an image.
"""

import math
import warnings
from collections.abc import Sequence

import torch

from ldm.arguments import remembers_arguments
from ldm.diffusion.precision import exact, expand, full_precision
from ldm.wording import check_choice

#: A zero signal-to-noise ratio is stored as this alphas_cumprod, so that sigma = 1e6 stands for infinity.
MIN_ALPHAS_CUMPROD = 1e-12


def _linspace(start: float, end: float, count: int) -> torch.Tensor:
    # The device is said, so that a model built under a meta device still gets tables of numbers.
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def shift_time(t, shift: float):
    """t' = s t / (1 + (s - 1) t), which is sigma' = s * sigma for sigma = t / (1 - t) (SD3, eq. 23)."""
    return shift * t / (shift * t + (1 - t))  # written so that 1 stays 1 in floating point


def resolution_shift(channels: int, height: int, width: int) -> float:
    """The shift s = sqrt(C H W / 4096) that keeps the signal-to-noise ratio of a whole image as it grows."""
    return math.sqrt(channels * height * width / 4096)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> torch.Tensor:
    """`steps` sigmas from sigma_max to sigma_min, even in sigma^(1/rho), then 0 (EDM, eq. 5)."""
    ramp = _linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)
    return torch.cat([ramp**rho, ramp.new_zeros(1)])


def make_betas(
    schedule: str, timesteps: int, linear_start: float, linear_end: float, cosine_s: float
) -> torch.Tensor:
    """Forward variances (timesteps,) of q(x_t | x_{t-1}), by the names of CompVis/latent-diffusion.

    `linear` is linear in sqrt(beta) (elsewhere "scaled linear"); `sqrt_linear` is DDPM's plain linear one;
    `sqrt` its square root; `cosine` is improved DDPM's eq. 17.
    """
    check_choice("schedule", schedule, ("linear", "sqrt_linear", "cosine", "sqrt"))
    if schedule == "cosine":
        t = _linspace(0, 1, timesteps + 1)
        alphas_cumprod = torch.cos((t + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)
    if schedule == "linear":
        return _linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
    if schedule == "sqrt_linear":
        return _linspace(linear_start, linear_end, timesteps)
    return _linspace(linear_start, linear_end, timesteps) ** 0.5


def zero_terminal(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """sqrt(alphas_cumprod) shifted and scaled to end at 0, start as it was (Lin et al. 2023, Alg. 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def respaced_timesteps(timesteps: int, spec: str) -> list[int]:
    """Ascending timesteps of improved-diffusion's `timestep_respacing`.

    "ddim50": the first integer stride that gives 50 of them; "10,15,20": as many from each of three equal
    sections, first and last of each section included.
    """
    if spec.startswith("ddim"):
        wanted = int(spec.removeprefix("ddim"))
        for stride in range(1, timesteps + 1):
            chosen = range(0, timesteps, stride)
            if len(chosen) == wanted:
                return list(chosen)
        raise ValueError(f"respacing {spec!r}: no integer stride takes {wanted} of {timesteps} timesteps")
    counts = [int(count) for count in spec.split(",")]
    size, larger = divmod(timesteps, len(counts))
    chosen, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < larger)
        if not 1 <= count <= length:
            raise ValueError(f"respacing {spec!r}: section {i} has {length} timesteps, cannot take {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride  # summed up, not multiplied: ties then round as they did in the published runs
        start += length
    return chosen


@remembers_arguments
class DiscreteSchedule:
    """Variance-preserving diffusion in T steps: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise (DDPM, eq. 4).

    The model's time is the index t = 0 .. T - 1 (fractions between: log sigma is interpolated), its sigma is
    sqrt((1 - a_t) / a_t), its samples are x / sqrt(1 + sigma^2).

    Args:
        schedule: name of the betas, see `make_betas`.
        timesteps: number of steps T, at least 2.
        linear_start, linear_end: first and last beta of all schedules but the cosine.
        cosine_s: offset of the cosine.
        betas: the betas themselves, in (0, 1); `schedule` and its options are then not read.
        zero_terminal_snr: rescale so that the last step is pure noise (sigma 1e6); needs a v or x0 model and
            trailing steps.

    Raises:
        ValueError: an unknown schedule; betas out of range or that leave no signal before the last step.

    Attributes:
        betas, alphas_cumprod, sigmas_all: float64 of shape (T,).
    """

    SPACINGS = ("uniform", "quad", "trailing", "leading", "linspace", "respaced", "karras")

    def __init__(
        self,
        schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        betas: Sequence[float] | torch.Tensor | None = None,
        zero_terminal_snr: bool = False,
    ):
        if betas is None:
            betas = make_betas(schedule, timesteps, linear_start, linear_end, cosine_s)
        self.betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").clone()
        if self.betas.ndim != 1 or len(self.betas) < 2 or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError("betas must be at least 2 numbers in (0, 1)")
        self.timesteps = len(self.betas)
        self.zero_terminal_snr = zero_terminal_snr
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        if zero_terminal_snr:
            self.alphas_cumprod = zero_terminal(self.alphas_cumprod).clamp(min=MIN_ALPHAS_CUMPROD)
            self.betas[1:] = 1 - self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]
        self.sigmas_all = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        if self.alphas_cumprod[-1] < MIN_ALPHAS_CUMPROD or not (self.sigmas_all.diff() > 0).all():
            raise ValueError(
                f"betas leave alphas_cumprod at {self.alphas_cumprod[-1]:.1e}; it must fall at every step "
                f"and end at {MIN_ALPHAS_CUMPROD} or above (zero_terminal_snr=True)"
            )

    def sigma(self, t) -> torch.Tensor:
        """sigma at time t in [0, T - 1]: the table's own value at integers, log-linear between them."""
        t = exact(t).clamp(0, self.timesteps - 1)
        low = t.floor().long()
        table = self._table(t.device)
        ratio = table[(low + 1).clamp(max=self.timesteps - 1)] / table[low]
        return table[low] * ratio ** (t - low)

    def time(self, sigma) -> torch.Tensor:
        """Time in [0, T - 1] of sigma: exactly t for the table's sigma_t; beyond the table, its ends."""
        sigma = exact(sigma)
        table = self._table(sigma.device)
        high = torch.searchsorted(table, sigma.contiguous()).clamp(1, self.timesteps - 1)
        below = table[high - 1]
        fraction = (sigma / below).log() / (table[high] / below).log()
        return high - 1 + fraction.clamp(0, 1)

    def scale(self, sigma) -> torch.Tensor:
        """The model's sample is scale * x = x / sqrt(1 + sigma^2)."""
        return (1 + exact(sigma) ** 2).rsqrt()

    def start(self, noise: torch.Tensor, sigma) -> torch.Tensor:
        """The x from which sampling starts at sigma: the model sees `noise` itself, as in DDPM and DDIM."""
        noise = full_precision(noise)
        return noise * expand((1 + exact(sigma) ** 2).sqrt(), noise)

    def draw(self, unit) -> torch.Tensor:
        """sigma of the training step at unit time in (0, 1): that of timestep floor(unit * T)."""
        unit = exact(unit)
        return self._table(unit.device)[(unit * self.timesteps).long().clamp(0, self.timesteps - 1)]

    def sigmas(self, steps: int, spacing: str = "trailing", rho: float = 7.0) -> torch.Tensor:
        """Descending sigmas for a sampler, float64 of shape (S + 1,).

        uniform: the original DDIM sampler's timesteps range(0, T, T // steps) + 1, ending at the sigma of
            alphas_cumprod[0], not at 0. As there, S is not always `steps` (30 of 1000 gives 31): a warning
            says so; and some run past T (300 of 1000): an error.
        quad: its quadratic timesteps, int(linspace(0, sqrt(0.8 T), steps)^2) + 1, same end. Repeated
            timesteps, which do not move a DDIM sample, are left out.
        trailing: from T - 1 down in steps of T / steps (Lin et al. 2023), ending at 0.
        leading: multiples of T // steps from 0 up, ending at 0.
        linspace: `steps` fractional times from T - 1 to 0 (k-diffusion), then 0.
        respaced: the same, rounded as improved-diffusion's `timestep_respacing` rounds, then 0.
        karras: `karras_sigmas` with `rho` between the table's ends, then 0.
        """
        total = self.timesteps
        check_choice("spacing", spacing, self.SPACINGS)
        if steps < 1 or (steps > total and spacing != "karras"):
            raise ValueError(f"steps is {steps}, must be from 1 to the schedule's {total} timesteps")
        if spacing == "karras":
            return karras_sigmas(steps, self.sigmas_all[0].item(), self.sigmas_all[-1].item(), rho)
        if spacing == "linspace":
            return self.sigmas_at(_linspace(0, total - 1, steps) if steps > 1 else [total - 1])
        if spacing == "respaced":
            return self.sigmas_at(respaced_timesteps(total, str(steps)))
        if spacing == "leading":
            return self.sigmas_at([i * (total // steps) for i in range(steps)])
        if spacing == "trailing":
            return self.sigmas_at([round(total - i * total / steps) - 1 for i in range(steps)][::-1])
        if spacing == "uniform":
            times = [t + 1 for t in range(0, total, total // steps)]
        else:
            # Stepped as numpy's linspace is: some squares are whole numbers, give or take a rounding.
            end = math.sqrt(0.8 * total)
            roots = [i * (end / (steps - 1)) for i in range(steps - 1)] + [end] if steps > 1 else [0.0]
            times = sorted({int(root * root) + 1 for root in roots})
        if times[-1] >= total:
            raise ValueError(f"{steps} {spacing} steps run past the last of {total} timesteps")
        if len(times) != steps:
            warnings.warn(
                f"{spacing} spacing gives {len(times)} steps for {steps} asked; trailing gives {steps}",
                stacklevel=2,
            )
        return self.sigmas_at(times, final=self.sigmas_all[0].item())

    def sigmas_at(self, timesteps: Sequence[float] | torch.Tensor, final: float = 0.0) -> torch.Tensor:
        """Descending sigmas of ascending `timesteps`, then `final`; (len(timesteps) + 1,)."""
        times = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        return torch.cat([self.sigma(times.flip(0)), times.new_tensor([final])])

    def buffers_like_original(self) -> dict[str, torch.Tensor]:
        """The 12 float32 tables, (T,) each, that checkpoints of CompVis/latent-diffusion carry."""
        betas, now = self.betas, self.alphas_cumprod
        before = torch.cat([now.new_ones(1), now[:-1]])
        posterior_variance = betas * (1 - before) / (1 - now)
        tables = {
            "betas": betas,
            "alphas_cumprod": now,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": now.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - now).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - now).log(),
            "sqrt_recip_alphas_cumprod": now.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": self.sigmas_all,
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": posterior_variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - now),
            "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - now),
        }
        return {name: table.float() for name, table in tables.items()}

    def _table(self, device: torch.device) -> torch.Tensor:
        return self.sigmas_all.to(device, non_blocking=device.type == "cuda")


class _FromNoise:
    def start(self, noise: torch.Tensor, sigma) -> torch.Tensor:
        """The x from which sampling starts at sigma: sigma * noise."""
        noise = full_precision(noise)
        return noise * expand(exact(sigma), noise)


@remembers_arguments
class FlowSchedule(_FromNoise):
    """Rectified flow: x_t = (1 - t) x0 + t noise (Liu et al. 2022; SD3, eq. 13), so sigma = t / (1 - t).

    The network's time is 1000 t. `sigma_max` stands for infinity, at t = 1.
    """

    SPACINGS = ("uniform",)

    def __init__(self, sigma_max: float = 1e6):
        if not sigma_max > 0:
            raise ValueError(f"sigma_max is {sigma_max}, must be above 0")
        self.sigma_max = float(sigma_max)

    def sigma(self, t) -> torch.Tensor:
        """sigma at network time t in [0, 1000], at most `sigma_max`."""
        t = exact(t).clamp(0, 1000)
        return (t / (1000 - t)).clamp(max=self.sigma_max)

    def time(self, sigma) -> torch.Tensor:
        """Network time 1000 sigma / (1 + sigma)."""
        sigma = exact(sigma)
        return 1000 * sigma / (1 + sigma)

    def scale(self, sigma) -> torch.Tensor:
        """The model's sample is scale * x = x / (1 + sigma)."""
        return 1 / (1 + exact(sigma))

    def draw(self, unit) -> torch.Tensor:
        """sigma of the training step at unit time t in (0, 1)."""
        return self.sigma(1000 * exact(unit))

    def sigmas(self, steps: int, spacing: str = "uniform", shift: float = 1.0) -> torch.Tensor:
        """`steps` equal steps in t from 1 to 0, moved by `shift_time`; falling, float64 (steps + 1,)."""
        check_choice("spacing", spacing, self.SPACINGS)
        if steps < 1 or not 0 < shift < math.inf:
            raise ValueError(f"steps is {steps}, must be at least 1, shift {shift}, finite and above 0")
        t = _linspace(1, 0, steps + 1)
        return self.sigma(1000 * shift_time(t, shift))


@remembers_arguments
class EDMSchedule(_FromNoise):
    """Diffusion as EDM puts it: samples are not scaled, the network's time is ln(sigma) / 4 (EDM, table 1).

    Training draws sigma = t / (1 - t) of unit time t, so TimeLogitNormal(P_mean, P_std) is EDM's log-normal.
    """

    SPACINGS = ("karras",)

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"must be 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def sigma(self, t) -> torch.Tensor:
        """sigma = exp(4 t)."""
        return (4 * exact(t)).exp()

    def time(self, sigma) -> torch.Tensor:
        """Network time ln(sigma) / 4."""
        return exact(sigma).log() / 4

    def scale(self, sigma) -> torch.Tensor:
        """1: samples are not scaled (the network's input is, by the denoiser)."""
        return torch.ones_like(exact(sigma))

    def draw(self, unit) -> torch.Tensor:
        """sigma of the training step at unit time in (0, 1)."""
        unit = exact(unit)
        return unit / (1 - unit)

    def sigmas(self, steps: int, spacing: str = "karras", rho: float = 7.0) -> torch.Tensor:
        """`karras_sigmas` from sigma_max to sigma_min, then 0; float64 of shape (steps + 1,)."""
        check_choice("spacing", spacing, self.SPACINGS)
        return karras_sigmas(steps, self.sigma_min, self.sigma_max, rho)
