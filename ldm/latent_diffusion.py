"""`LatentDiffusion`: first stage + conditioner + network + denoiser, and sampling from it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning import Conditioner
from ldm.conditioning.conditioner import KINDS
from ldm.diffusion import samplers
from ldm.diffusion.denoiser import Clipped, Denoise, Denoiser
from ldm.diffusion.guidance import ClassifierFreeGuidance
from ldm.diffusion.random import normal
from ldm.diffusion.schedule import DiscreteSchedule, FlowSchedule

# From here up, Karras' spacing spends its steps on noise alone (a cosine schedule, a zero terminal SNR).
_KARRAS_BELOW = 200.0


class DiffusionWrapper(nn.Module):
    """Hands conditions to the network, and has it under the name that published checkpoints use.

    `crossattn` goes to the network as `context`, `vector` as `y`, and `concat` is joined to the noisy latent
    along the channels. What a network in half precision takes and gives is converted here, so that samplers
    and latents keep theirs.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.diffusion_model = network

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        crossattn: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        dtype = _computing_type(self.diffusion_model, z)
        given = z if concat is None else torch.cat([z, concat.to(z.dtype)], dim=1)
        crossattn, vector = (
            c.to(dtype) if c is not None and c.is_floating_point() else c for c in (crossattn, vector)
        )
        raw = self.diffusion_model(given.to(dtype), t, context=crossattn, y=vector)
        return raw if dtype == z.dtype else raw.to(z.dtype)


def _computing_type(module: nn.Module, x: Tensor) -> torch.dtype:
    """The type in which a module wants its input: its weights'; under autocast, or without weights, x's."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)


@remembers_arguments
class LatentDiffusion(nn.Module):
    """A diffusion model in the latent space of a first stage (Rombach et al., 2022).

    Args:
        first_stage: autoencoder with the first-stage contract (`moments`, `decode_latent`, `latent_channels`,
            `downsampling_factor`).
        network: `network(z_t, t, context=..., y=...) -> raw`, latents of shape (B, C, h, w).
        denoiser: says what the network's output means.
        conditioner: turns a batch into conditions; None is unconditional.
        image_size: side, or (height, width), in pixels that sampling produces by default.
        latent_shift, latent_scale: z = (first-stage latent - shift) * scale; a number or one a channel.
            Stable Diffusion's `scale_factor` is `latent_scale` with shift 0.
        clip_x0: sampling clamps x0 to [-1, 1], as DDPM and ADM do; for models of pixels.
        sampler_defaults: {name of a sampler: {option: value}}, `spacing` among them, for what the caller of
            `sample` leaves open; so that a published model gives the published samples.

    Raises:
        ValueError: sizes or channel counts that do not fit together.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        network: nn.Module,
        denoiser: Denoiser,
        conditioner: Conditioner | None = None,
        image_size: int | Sequence[int] = 256,
        latent_shift: float | Sequence[float] = 0.0,
        latent_scale: float | Sequence[float] = 1.0,
        clip_x0: bool = False,
        sampler_defaults: dict[str, dict] | None = None,
    ):
        super().__init__()
        self.first_stage_model = first_stage
        self.model = DiffusionWrapper(network)
        self.conditioner = conditioner if conditioner is not None else Conditioner()
        self.denoiser = denoiser
        self.clip_x0 = clip_x0
        self.sampler_defaults = {name: dict(own) for name, own in (sampler_defaults or {}).items()}
        unknown = sorted(set(self.sampler_defaults) - set(samplers.SAMPLERS))
        if unknown:
            raise ValueError(f"sampler_defaults: {unknown[0]!r} is none of {', '.join(samplers.SAMPLERS)}")
        for embedder in self.conditioner.embedders:
            embedder.attach(self)
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"image_size must be a side or (height, width) in pixels, got {image_size!r}")
        self.image_size = height, width = sides
        channels, factor = first_stage.latent_channels, first_stage.downsampling_factor
        if height % factor or width % factor:
            raise ValueError(
                f"image_size {height}x{width} is not a multiple of the first stage's downsampling factor, "
                f"{factor}"
            )
        out_channels = getattr(network, "out_channels", channels)
        expected = channels * (2 if denoiser.learned_variance else 1)
        if out_channels != expected:
            raise ValueError(
                f"the network returns {out_channels} channels; the first stage's latents have {channels}, so "
                f"out_channels must be {expected} (learned_variance={denoiser.learned_variance})"
            )
        maps = any(embedder.kind == "concat" for embedder in self.conditioner.embedders)
        in_channels = getattr(network, "in_channels", channels)
        if (in_channels <= channels) if maps else (in_channels != channels):
            raise ValueError(
                f"the network takes {in_channels} channels, but the first stage's latents have {channels}"
                + (" and the concatenated maps come on top" if maps else "")
            )
        self.latent_shape = (channels, height // factor, width // factor)
        for name, value in (("latent_shift", latent_shift), ("latent_scale", latent_scale)):
            # The device is said, so that a model built under a meta device still gets numbers.
            tensor = torch.as_tensor(value, dtype=torch.float32, device=getattr(value, "device", "cpu"))
            if tensor.ndim and tensor.numel() not in (1, channels):
                raise ValueError(f"{name} has {tensor.numel()} values, the latents have {channels} channels")
            if not tensor.isfinite().all() or (name == "latent_scale" and not tensor.all()):
                raise ValueError(f"{name} must be finite, and a scale not 0, got {value}")
            # One value a channel, so that what is measured can be written over what was built.
            self.register_buffer(name, tensor.reshape(-1).expand(channels).reshape(-1, 1, 1).clone())

    @property
    def network(self) -> nn.Module:
        return self.model.diffusion_model

    @property
    def device(self) -> torch.device:
        return self.latent_shift.device

    def normalize(self, latent: Tensor) -> Tensor:
        """First-stage latent -> z, what the network is trained on: about zero mean and unit variance."""
        return (latent - self.latent_shift) * self.latent_scale

    def denormalize(self, z: Tensor) -> Tensor:
        """z -> first-stage latent."""
        return z / self.latent_scale + self.latent_shift

    def encode(self, image: Tensor):
        """As the first stage's `encode`: its own latent, neither shifted nor scaled."""
        return self.first_stage_model.encode(image)

    def decode(self, latent: Tensor) -> Tensor:
        """As the first stage's `decode_latent`, of a latent that is neither shifted nor scaled."""
        return self.first_stage_model.decode_latent(latent)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """As the first stage's `moments`, in the image's type whatever the type of the weights."""
        dtype = _computing_type(self.first_stage_model, image)
        mean, std = self.first_stage_model.moments(image.to(dtype))
        return (mean, std) if dtype == image.dtype else (mean.to(image.dtype), std.to(image.dtype))

    @torch.no_grad()
    def to_latent(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> z (B, c, h, w); `noise` samples the posterior, None takes its
        mean.
        """
        mean, std = self.moments(image)
        return self.normalize(mean if noise is None else mean + std * noise)

    @torch.no_grad()
    def to_image(self, z: Tensor) -> Tensor:
        """z (B, c, h, w) -> images (B, C, H, W), about [-1, 1], not clamped."""
        latent = self.denormalize(z)
        dtype = _computing_type(self.first_stage_model, latent)
        image = self.first_stage_model.decode_latent(latent.to(dtype))
        return image if dtype == latent.dtype else image.to(latent.dtype)

    def predict(self, z_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Raw output of the network at noisy latents (B, c, h, w) and network times (B,).

        Raises:
            ValueError: `cond` is not what `conditioner` makes.
        """
        check_conditions(cond, "cond")
        return self.model(z_t, t, **(cond or {}))

    def forward(
        self, z_t: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """As `predict`, called as the network itself is called."""
        return self.model(z_t, t, crossattn=context, vector=y)

    def denoise_fn(
        self,
        cond: dict[str, Tensor] | None = None,
        uncond: dict[str, Tensor] | None = None,
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> Callable[..., Tensor]:
        """`denoise(x, sigma) -> x0` under `cond`, guided against `uncond` where `guidance` is not 1."""
        plain = self.denoiser.bind(self.model)
        if guidance != 1.0 and not uncond:
            raise ValueError(
                f"guidance={guidance} needs a condition and its absence (`uncond`); there is none here"
            )
        guided = ClassifierFreeGuidance(plain, cond or {}, uncond or cond or {}, guidance, interval)
        return Clipped(guided) if self.clip_x0 else guided


def check_conditions(cond: object, name: str) -> None:
    """Hold a condition against what the network's wrapper takes.

    Raises:
        ValueError: no mapping of kinds to tensors.
    """
    if cond is None:
        return
    how = f"{name} must be what model.conditioner(batch) makes, a dict with tensors under {', '.join(KINDS)}"
    if not isinstance(cond, Mapping):
        raise ValueError(f"{how}; got a {type(cond).__name__}")
    wrong = [str(kind) for kind, value in cond.items() if kind not in KINDS or not torch.is_tensor(value)]
    if wrong:
        raise ValueError(f"{how}; got {', '.join(wrong)}")


def default_spacing(schedule, sampler: str) -> str | None:
    """How the steps of a sampler are spaced where nobody says; None for a schedule with one spacing.

    Over discrete timesteps, `linspace`: as many steps as asked for, from the last timestep to the first, then
    to 0 (k-diffusion; improved-diffusion's respacing rounds the same times). `dpmpp_2m` extrapolates over
    ln(sigma), in which the last of these steps is far too long: it takes `karras`, or `trailing` where sigma
    starts too high.
    """
    if not isinstance(schedule, DiscreteSchedule):
        return None
    if sampler != "dpmpp_2m":
        return "linspace"
    return "karras" if schedule.sigmas_all[-1] < _KARRAS_BELOW else "trailing"


def sampling_sigmas(
    denoiser: Denoiser,
    steps: int,
    spacing: str | None = None,
    sampler: str = "euler",
    shift: float | None = None,
) -> Tensor:
    """The sigmas that a sampler walks, (steps + 1,), at this spacing or at the default one.

    Raises:
        ValueError: what the schedule refuses; a `shift` of a schedule that has none.
    """
    spacing = spacing or default_spacing(denoiser.schedule, sampler)
    options = {"spacing": spacing} if spacing else {}
    if shift is not None:
        if not isinstance(denoiser.schedule, FlowSchedule):
            raise ValueError(
                f"shift {shift:g} belongs to flow models (FlowSchedule); this one has a "
                f"{type(denoiser.schedule).__name__}, whose steps `spacing` places"
            )
        options["shift"] = shift
    return denoiser.schedule.sigmas(steps, **options)


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    n: int | None = None,
    cond: dict[str, Tensor] | None = None,
    uncond: dict[str, Tensor] | None = None,
    sampler: str = "euler",
    steps: int = 30,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    eta: float | None = None,
    seed: int = 0,
    *,
    spacing: str | None = None,
    shift: float | None = None,
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
        sampler: a name in `ldm.diffusion.samplers.SAMPLERS`; each works with each schedule.
        steps: steps of the sampler; heun, and the first step of plms, call the network twice.
        guidance: classifier-free guidance; 1 is none, 0 the unconditional model.
        noise: starting noise (n, c, h, w) in place of the seed's.
        eta: randomness of ddim, 0 none, 1 that of DDPM; other samplers refuse it.
        spacing: how the steps are spaced, see the schedule's `sigmas`; None is the model's own
            (`sampler_defaults`), else `default_spacing`. `sigmas` gives them outright.
        shift: moves the steps of a flow model towards noise, see `ldm.diffusion.schedule.shift_time`; None is
            the schedule's own, 1.
        interval: (low, high), guide where low < sigma <= high only.
        steer: makes another denoise function of this one, which the sampler then follows; for guidance by a
            classifier `lambda denoise: ClassifierGuidance(denoise, classifier, labels, ...)`.
        latent_shape: (c, h, w) where it differs from the model's own.
        callback: `callback(i, x, x0, sigma)` in every step.
        options: handed to the sampler. A learned variance is used by ddpm unless its `variance` says
            otherwise.

    Raises:
        ValueError: unknown sampler or spacing, counts that contradict each other, guidance without a
            condition.
    """
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"a LatentDiffusion can be sampled, not a {type(model).__name__} alone")
    check_conditions(cond, "cond")
    check_conditions(uncond, "uncond")
    n = _count(n, cond, noise)
    if sampler not in samplers.SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; there are {', '.join(samplers.SAMPLERS)}")
    if model.conditioner.keys and not cond:
        raise ValueError(
            f"this model is conditioned on {', '.join(model.conditioner.keys)}: give "
            "cond=model.conditioner(batch), or cond=model.conditioner.unconditional(n)"
        )
    if eta is not None:
        if sampler != "ddim":
            raise ValueError(f"eta belongs to the ddim sampler, not to {sampler}")
        options["eta"] = eta
    options = model.sampler_defaults.get(sampler, {}) | options
    own_spacing = options.pop("spacing", None)
    if sampler == "ddpm" and model.denoiser.learned_variance:
        options.setdefault("variance", "learned")
    device, shape = model.device, tuple(latent_shape or model.latent_shape)
    if noise is not None and noise.shape != (n, *shape):
        raise ValueError(f"noise must be {(n, *shape)}, got {tuple(noise.shape)}")
    if guidance != 1.0 and uncond is None and cond:
        uncond = model.conditioner.unconditional(n, device)
    denoise = model.denoise_fn(cond, uncond, guidance, interval)
    denoise = denoise if steer is None else steer(denoise)
    if sigmas is None:
        sigmas = sampling_sigmas(model.denoiser, steps, spacing or own_spacing, sampler, shift)
    noises = _Noises(seed, first_index, n, shape, device)
    x = noises.start() if noise is None else noise.to(device)
    x = model.denoiser.schedule.start(x, sigmas[0])
    x = samplers.SAMPLERS[sampler](denoise, x, sigmas, noise_fn=noises, callback=callback, **options)
    return x * model.denoiser.schedule.scale(sigmas[-1]).to(x.device, x.dtype)


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


def _count(n: int | None, cond: dict[str, Tensor] | None, noise: Tensor | None) -> int:
    counts = {len(v) for v in (cond or {}).values()} | ({len(noise)} if noise is not None else set())
    counts |= {n} if n is not None else set()
    if len(counts) != 1:
        raise ValueError(
            f"how many samples? n, noise and cond must agree, got {sorted(counts) or 'none of them'}"
        )
    (count,) = counts
    if count < 1:
        raise ValueError(f"n must be at least 1, got {count}")
    return count
