"""From conditions to latents."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.random import normal
from ldm.latent_diffusion import LatentDiffusion, check_conditions
from ldm.sampling.section import Sampling, find_sampler


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    n: int | None = None,
    cond: dict[str, Tensor] | None = None,
    uncond: dict[str, Tensor] | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    *,
    spacing: str | None = None,
    shift: float | Literal["auto"] | None = None,
    settings: Sampling | None = None,
    interval: tuple[float, float] | None = None,
    steer: Callable[[Denoise], Denoise] | None = None,
    first_index: int = 0,
    latent_shape: tuple[int, int, int] | None = None,
    sigmas: Tensor | None = None,
    callback: Callable | None = None,
    **options,
) -> Tensor:
    """Draw z (n, c, h, w); `model.to_image(z)` decodes it.

    All randomness is a function of (seed, index of the image): image `first_index + i` starts from and is
    given the same noise whatever `n` is.

    Args:
        n: number of samples; taken from `noise` or `cond` where not given.
        cond, uncond: conditions as `model.conditioner` makes them, with and without what guides; `uncond` is
            the conditioner's own absent condition where guidance needs it and it is not given.
        sampler, steps, guidance, spacing, shift, options: fields of `Sampling` and the sampler's own options,
            or `settings`, all at once; None leaves one to the model, see `Sampling.of`. ddpm uses a learned
            variance unless its `variance` says otherwise.
        noise: starting noise (n, c, h, w) in place of the seed's.
        interval: (low, high), guide where low < sigma <= high only.
        steer: makes another denoise function of this one, which the sampler then follows, such as
            `lambda denoise: ClassifierGuidance(denoise, classifier, labels, ...)`.
        latent_shape: (c, h, w) where it differs from the model's own.
        sigmas: the steps outright, in place of steps, spacing and shift.
        callback: `callback(i, x, x0, sigma)` in every step.

    Raises:
        ValueError: unknown sampler or spacing, counts that contradict each other, guidance without a
            condition.
    """
    asked = {"sampler": sampler, "steps": steps, "guidance": guidance, "spacing": spacing, "shift": shift}
    settings = settled(model, settings, **asked, **options)
    check_conditions(cond, "cond")
    check_conditions(uncond, "uncond")
    n = count_of(n, cond, noise)
    if model.conditioner.keys and not cond:
        raise ValueError(
            f"this model is conditioned on {', '.join(model.conditioner.keys)}: give "
            "cond=model.conditioner(batch), or cond=model.conditioner.unconditional(n)"
        )
    options = {**model.sampler_defaults.get(settings.sampler, {}), **settings.options}
    options.pop("spacing", None)
    if settings.sampler == "ddpm" and model.denoiser.learned_variance:
        options.setdefault("variance", "learned")
    device, shape = model.device, tuple(latent_shape or model.latent_shape)
    if noise is not None and noise.shape != (n, *shape):
        raise ValueError(f"noise must be {(n, *shape)}, got {tuple(noise.shape)}")
    if settings.guidance != 1.0 and uncond is None and cond:
        uncond = model.conditioner.unconditional(n, device)
    denoise = model.denoise_fn(cond, uncond, settings.guidance, interval)
    denoise = denoise if steer is None else steer(denoise)
    sigmas = settings.sigmas(model) if sigmas is None else sigmas
    # Drawn on the CPU where the device lacks float64.
    where = "cpu" if device.type == "mps" else device
    positions, calls = torch.arange(first_index, first_index + n, device=where), itertools.count(1)

    def drawn(stream: str) -> Tensor:
        return normal(seed, stream, positions, shape).to(device)

    x = drawn("sample") if noise is None else noise.to(device)
    x = model.denoiser.schedule.start(x, sigmas[0])
    options |= {
        "noise_fn": lambda sigma, sigma_next: drawn(f"sample-step-{next(calls)}"),
        "callback": callback,
    }
    x = find_sampler(settings.sampler)(denoise, x, sigmas, **options)
    return x * model.denoiser.schedule.scale(sigmas[-1]).to(x.device, x.dtype)


def settled(model: LatentDiffusion, settings: Sampling | None, **asked: Any) -> Sampling:
    """`settings`, or where there are none `Sampling.of` what is asked for.

    Raises:
        ValueError: both are given, or `model` is no LatentDiffusion.
    """
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"a LatentDiffusion can be sampled, not a {type(model).__name__} alone")
    twice = [name for name, value in asked.items() if value is not None] if settings is not None else []
    if twice:
        raise ValueError(f"settings are given, and {', '.join(twice)} besides; say it in one of them")
    return settings or Sampling.of(model, **asked)


def count_of(n: int | None, values: Mapping[str, Any] | None, noise: Tensor | None = None) -> int:
    """The number of samples that these agree on.

    Raises:
        ValueError: they do not, none of them says it, or it is below 1.
    """
    counts = {len(v) for v in (*(values or {}).values(), noise) if v is not None} | ({n} - {None})
    if len(counts) != 1:
        found = sorted(counts) or "none of them"
        raise ValueError(f"how many samples? n, noise and conditions must agree, got {found}")
    (count,) = counts
    if count < 1:
        raise ValueError(f"n must be at least 1, got {count}")
    return count
