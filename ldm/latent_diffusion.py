"""`LatentDiffusion`: first stage + conditioner + network + denoiser."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning import Conditioner
from ldm.conditioning.conditioner import KINDS
from ldm.diffusion import samplers
from ldm.diffusion.denoiser import Clipped, Denoiser
from ldm.diffusion.guidance import ClassifierFreeGuidance
from ldm.nn.patch import as_pair
from ldm.wording import check_choice


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
            `ldm.sample` leaves open; so that a published model gives the published samples.

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
        for name in self.sampler_defaults:
            check_choice("a key of sampler_defaults", name, samplers.SAMPLERS)
        for embedder in self.conditioner.embedders:
            embedder.attach(self)
        self.image_size = height, width = as_pair(image_size, "image_size")
        channels, factor = first_stage.latent_channels, first_stage.downsampling_factor
        if height % factor or width % factor:
            raise ValueError(f"image_size {height}x{width} is not a multiple of the first stage's {factor}")
        out_channels = getattr(network, "out_channels", channels)
        expected = channels * (2 if denoiser.learned_variance else 1)
        if out_channels != expected:
            raise ValueError(
                f"the network returns {out_channels} channels; for latents that have {channels}, "
                f"out_channels must be {expected} (learned_variance={denoiser.learned_variance})"
            )
        maps = any(embedder.kind == "concat" for embedder in self.conditioner.embedders)
        in_channels = getattr(network, "in_channels", channels)
        if (in_channels <= channels) if maps else (in_channels != channels):
            more = " and the concatenated maps come on top" if maps else ""
            raise ValueError(f"the network takes {in_channels} channels, but latents have {channels}{more}")
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
        """Images (B, C, H, W) in [-1, 1] -> z (B, c, h, w), of the posterior's mean without `noise`."""
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
        """Raw output of the network at noisy latents (B, c, h, w) and network times (B,), under `cond` as
        `conditioner` makes it (else ValueError)."""
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
            raise ValueError(f"guidance={guidance} needs a condition and its absence (`uncond`)")
        guided = ClassifierFreeGuidance(plain, cond or {}, uncond or cond or {}, guidance, interval)
        return Clipped(guided) if self.clip_x0 else guided


def check_conditions(cond: object, name: str) -> None:
    """ValueError unless `cond` is None or a mapping of kinds to tensors, as `conditioner` makes it."""
    if cond is None:
        return
    how = f"{name} must be what model.conditioner(batch) makes, a dict with tensors under {', '.join(KINDS)}"
    if not isinstance(cond, Mapping):
        raise ValueError(f"{how}; got a {type(cond).__name__}")
    wrong = [str(kind) for kind, value in cond.items() if kind not in KINDS or not torch.is_tensor(value)]
    if wrong:
        raise ValueError(f"{how}; got {', '.join(wrong)}")
