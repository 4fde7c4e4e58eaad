"""From conditions to images: the settings of sampling, `sample` (latents) and `draw` (images)."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.config import check_section, signatures
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.random import normal
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import resolution_shift
from ldm.diffusion.spacing import sampling_sigmas
from ldm.latent_diffusion import LatentDiffusion, check_conditions
from ldm.wording import did_you_mean

# What a group of images may cost the network, in parameters times positions of the latent (about as many
# multiplications), and how many there are at most: enough to keep small networks busy, one image for large
# ones.
_GROUP_COST, _GROUP_MOST = 4e9, 16


@dataclass
class Sampling:
    """How a model is sampled: the section `sampling:` of a config, a model's own defaults, a request.

    sampler: a name in `ldm.diffusion.samplers.SAMPLERS`, or the dotted path of a function of yours with the
        contract of that module.
    steps: steps of the sampler; heun, and the first step of plms, call the network twice.
    guidance: classifier-free guidance; 1 is none, 0 the unconditional model.
    spacing: how the steps are spaced, see the schedule's `sigmas`; None is what the model was published with
        (`sampler_defaults`), else `default_spacing`.
    shift: how far the steps of a flow model are moved towards noise (`ldm.diffusion.schedule.shift_time`);
        `auto` follows from the latents' shape (`resolution_shift`), None is the schedule's own, 1.
    options: the sampler's own, such as `eta` of ddim: its keyword-only parameters. None says nothing.
    eta: the place of ddim's option in older files.

    Raises:
        ValueError: no such sampler, a sampler's option that it does not take, a number out of its range.
    """

    sampler: str = "euler"
    steps: int = 30
    guidance: float = 1.0
    spacing: str | None = None
    shift: float | Literal["auto"] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    eta: InitVar[float | None] = None

    def __post_init__(self, eta: float | None):
        options = {"eta": eta, **self.options}
        self.options = {name: value for name, value in options.items() if value is not None}
        if self.steps < 1:
            raise ValueError(f"steps must be a whole number from 1 on, got {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance} is no finite number")
        if self.shift not in (None, "auto") and not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a finite number above 0, got {self.shift}")
        _check_options(self.sampler, self.options)

    @classmethod
    def of(cls, model: LatentDiffusion, sampler: str | None = None, **asked: Any) -> "Sampling":
        """What is asked for, else the model's own (`sampling` in its description), else the toolkit's.

        Args:
            asked: fields, None for those that are left open, and options of the sampler. Another sampler
                than the model's own gets neither its options nor its spacing.

        Raises:
            ValueError: as the class; also where the model's own sampler is code outside `ldm` that the user
                has not named himself.
        """
        own = dict(getattr(model, "description", {}).get("sampling") or {})
        if sampler not in (None, own.get("sampler", cls.sampler)):
            own = {name: own[name] for name in own if name not in ("sampler", "spacing", "options", "eta")}
        elif sampler is None:
            _refuse_foreign(own.get("sampler"), getattr(model, "trusted", ()))
        if not model.conditioner.keys:
            own["guidance"] = 1.0
        settings = check_section(own, cls, "sampling")
        asked = {name: value for name, value in asked.items() if value is not None}
        changes = {name: asked.pop(name) for name in _FIELDS & asked.keys()}
        changes |= {"sampler": sampler or settings.sampler, "options": settings.options | asked}
        return replace(settings, **changes)

    def sigmas(self, model: LatentDiffusion) -> Tensor:
        """The sigmas that the sampler walks, (steps + 1,).

        Raises:
            ValueError: what the model's schedule refuses.
        """
        spacing = self.spacing or model.sampler_defaults.get(self.sampler, {}).get("spacing")
        shift = resolution_shift(*model.latent_shape) if self.shift == "auto" else self.shift
        return sampling_sigmas(model.denoiser, self.steps, spacing, self.sampler, shift)

    def facts(self) -> dict[str, Any]:
        """What was said, in words for a file: the fields that are not None, the options among them."""
        named = {"sampler": self.sampler, "steps": self.steps, "guidance": self.guidance}
        named |= {"spacing": self.spacing, **self.options, "shift": self.shift}
        return {name: value for name, value in named.items() if value is not None}


_FIELDS = {f.name for f in fields(Sampling)} - {"sampler", "options"}


def find_sampler(name: str) -> Callable:
    """The sampler of this name, or at this dotted path outside `ldm`.

    The path is imported: it must come from the user, never from a file of weights alone.

    Raises:
        ValueError: there is none, or it is no sampler.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if "." not in name:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {name!r} is unknown; there are {known}" + did_you_mean(name, SAMPLERS))
    found = signatures.resolve_target(name, allow_foreign=True)
    accepted = signatures.parameters(found)
    if accepted is not None and not {"noise_fn", "callback"} <= accepted.keys():
        raise ValueError(f"sampler {name} must take (denoise, x, sigmas, *, noise_fn, callback, ...)")
    return found


def _own_options(sampler: Callable) -> dict[str, inspect.Parameter] | None:
    """A sampler's own options, read off its signature; None where any goes."""
    accepted = signatures.parameters(sampler)
    if accepted is None:
        return None
    handed_in = ("noise_fn", "callback")
    return {n: p for n, p in accepted.items() if p.kind is p.KEYWORD_ONLY and n not in handed_in}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    sampler = find_sampler(name)
    own = _own_options(sampler)
    for option, value in options.items() if own is not None else ():
        if option not in own:
            others = [other for other, function in SAMPLERS.items() if option in _own_options(function)]
            what = f"belongs to the {' and '.join(others)} sampler, not to" if others else "is no option of"
            takes = ", ".join(own) or "no options of its own"
            hint = did_you_mean(option, [*own, *_FIELDS])
            raise ValueError(f"{option} {what} {name}, which takes {takes}{hint}")
        if problem := signatures.mismatch(value, own[option].annotation):
            raise ValueError(f"{option} of the sampler {name}: {problem}")
    if options:
        # The ranges are the sampler's to say: one step on a single number, from noise to nothing, asks it.
        x, sigmas = torch.zeros(1, 1, 1, 1), torch.tensor([1.0, 0.0], dtype=torch.float64)
        sampler(lambda x, sigma: x, x, sigmas, noise_fn=lambda *_: x, **options)


def _refuse_foreign(sampler: Any, trusted: Collection[str]) -> None:
    if isinstance(sampler, str) and "." in sampler and sampler not in trusted:
        raise ValueError(
            f"the model's own sampler {sampler} is code outside ldm, which runs only where you name it: as "
            "sampler, or in the YAML that you give with the model"
        )


def _settled(model: LatentDiffusion, settings: Sampling | None, **asked: Any) -> Sampling:
    twice = [name for name, value in asked.items() if value is not None] if settings is not None else []
    if twice:
        raise ValueError(f"settings are given, and {', '.join(twice)} besides; say it in one of them")
    return settings or Sampling.of(model, **asked)


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
        cond, uncond: conditions as `model.conditioner` makes them, with and without what guides. Where
            guidance is asked for and `uncond` is not given, the conditioner's own absent condition is used.
        sampler, steps, guidance, spacing, shift, options: fields of `Sampling` and the sampler's own options;
            None leaves one to the model, see `Sampling.of`. A learned variance is used by ddpm unless its
            `variance` says otherwise.
        settings: all of these at once.
        noise: starting noise (n, c, h, w) in place of the seed's.
        interval: (low, high), guide where low < sigma <= high only.
        steer: makes another denoise function of this one, which the sampler then follows; for guidance by a
            classifier `lambda denoise: ClassifierGuidance(denoise, classifier, labels, ...)`.
        latent_shape: (c, h, w) where it differs from the model's own.
        sigmas: the steps outright, in place of steps, spacing and shift.
        callback: `callback(i, x, x0, sigma)` in every step.

    Raises:
        ValueError: unknown sampler or spacing, counts that contradict each other, guidance without a
            condition.
    """
    _check_model(model)
    check_conditions(cond, "cond")
    check_conditions(uncond, "uncond")
    n = _count(n, cond, noise)
    if model.conditioner.keys and not cond:
        raise ValueError(
            f"this model is conditioned on {', '.join(model.conditioner.keys)}: give "
            "cond=model.conditioner(batch), or cond=model.conditioner.unconditional(n)"
        )
    asked = {"sampler": sampler, "steps": steps, "guidance": guidance, "spacing": spacing, "shift": shift}
    settings = _settled(model, settings, **asked, **options)
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
    noises = _Noises(seed, first_index, n, shape, device)
    x = noises.start() if noise is None else noise.to(device)
    x = model.denoiser.schedule.start(x, sigmas[0])
    function = find_sampler(settings.sampler)
    x = function(denoise, x, sigmas, noise_fn=noises, callback=callback, **options)
    return x * model.denoiser.schedule.scale(sigmas[-1]).to(x.device, x.dtype)


def _check_model(model: object) -> None:
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"a LatentDiffusion can be sampled, not a {type(model).__name__} alone")


class _Noises:
    """The starting noise and, call by call, the noise of the steps of `n` images."""

    def __init__(self, seed: int, first_index: int, n: int, shape: tuple[int, ...], device: torch.device):
        self.seed, self.shape, self.device = seed, shape, device
        # Drawn on the CPU where the device lacks float64.
        where = "cpu" if device.type == "mps" else device
        self.positions = torch.arange(first_index, first_index + n, device=where)
        self.drawn = 0

    def start(self) -> Tensor:
        return normal(self.seed, "sample", self.positions, self.shape).to(self.device)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        self.drawn += 1
        return normal(self.seed, f"sample-step-{self.drawn}", self.positions, self.shape).to(self.device)


def _count(n: int | None, values: Mapping[str, Any] | None, noise: Tensor | None = None) -> int:
    counts = {len(v) for v in (values or {}).values()} | ({len(noise)} if noise is not None else set())
    counts |= {n} if n is not None else set()
    if len(counts) != 1:
        raise ValueError(
            f"how many samples? n, noise and conditions must agree, got {sorted(counts) or 'none of them'}"
        )
    (count,) = counts
    if count < 1:
        raise ValueError(f"n must be at least 1, got {count}")
    return count


def draw(
    model: LatentDiffusion,
    n: int | None = None,
    conditions: Mapping[str, Any] | Callable[[list[int]], Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    settings: Sampling | None = None,
    batch_size: int = 64,
    exact: bool | None = None,
    progress: Callable[[int, int], None] | bool = False,
    **asked: Any,
) -> Iterator[Tensor]:
    """Draw images: batches (B, C, H, W), about in [-1, 1], float32 on the CPU, in order.

    Image i depends on the seed, i and its conditions alone. `sample.py` draws with this function.

    Args:
        n: how many; taken from `conditions` where those are given as a batch.
        conditions: a batch that the model's conditioner reads, e.g. {"label": tensor (n,)}, or a function of
            the indices of some images that makes theirs. None for an unconditional model.
        settings, asked: as `sample`'s: sampler, steps, guidance, spacing, shift and options of the sampler.
        batch_size: images at a time. It changes pixels by rounding at most, and nothing if `exact`.
        exact: compute in groups of `group_size`, the last one filled up with images that are thrown away:
            image i then always has place i mod G in a batch of G, and goes through the same arithmetic.
            None is True on the CPU.
        progress: called with (images drawn, n) after each batch; True shows a bar.

    Raises:
        ValueError: as `sample`; also images that are not finite, or more than the device's memory holds.
    """
    _check_model(model)
    settings = _settled(model, settings, **asked)
    n = _count(n, None if callable(conditions) else conditions)
    keys = ", ".join(model.conditioner.keys)
    if bool(keys) != (conditions is not None):
        given = "conditions are missing" if keys else "conditions were given"
        raise ValueError(f"{given}, and this model is conditioned on {keys or 'nothing'}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    settings.sigmas(model)  # what the schedule refuses is told now, not in the first batch
    exact = model.device.type == "cpu" if exact is None else exact
    size = group_size(model) if exact else batch_size
    return _batches(model, n, conditions, seed, settings, size, exact, _reporter(progress, n))


def _batches(
    model: LatentDiffusion, n: int, conditions, seed: int, settings: Sampling, size: int, exact: bool, report
) -> Iterator[Tensor]:
    for start in range(0, n, size):
        kept = min(size, n - start)
        computed = size if exact else kept
        with held_in_memory(computed), torch.no_grad():
            cond = None
            if conditions is not None:
                indices = [min(start + i, n - 1) for i in range(computed)]
                cond = model.conditioner(_taken(conditions, indices, model.device))
            z = sample(model, computed, cond, seed=seed, first_index=start, settings=settings)
            images = model.to_image(z)[:kept].float().cpu()
        if not images.isfinite().all():
            raise ValueError(
                f"images {start} to {start + kept - 1} are not finite: the model diverged in training, or "
                "needs float32"
            )
        report(start + kept, n)
        yield images


def _taken(conditions, indices: list[int], device: torch.device) -> dict[str, Any]:
    """What the conditioner reads for these images, on the device."""
    if callable(conditions):
        batch = conditions(indices)
    else:
        batch = {
            name: values[indices] if torch.is_tensor(values) else [values[i] for i in indices]
            for name, values in conditions.items()
        }
    return {name: v.to(device) if torch.is_tensor(v) else v for name, v in batch.items()}


def _reporter(progress: Callable[[int, int], None] | bool, n: int) -> Callable[[int, int], None]:
    if not progress:
        return lambda done, count: None
    if progress is not True:
        return progress
    from tqdm.auto import tqdm

    bar = tqdm(total=n, desc="sampling", unit="image")
    return lambda done, count: bar.update(done - bar.n)


@contextmanager
def held_in_memory(count: int) -> Iterator[None]:
    """Says in plain words when the device's memory does not hold `count` images at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the device's memory does not hold {count} images at a time ({error})") from error


def group_size(model: LatentDiffusion) -> int:
    """How many images are computed together where the same bits are wanted whatever the batch size.

    Kernels round differently for different batch shapes, so the shape has to be fixed, by the model alone.
    """
    cost = sum(p.numel() for p in model.network.parameters()) * math.prod(model.latent_shape[1:])
    most = min(_GROUP_MOST, max(1.0, _GROUP_COST / max(cost, 1)))
    return 2 ** int(math.log2(most))
