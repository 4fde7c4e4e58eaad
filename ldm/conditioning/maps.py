"""Images, masks and maps as conditions beside the noisy latent."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning.conditioner import Embedder
from ldm.wording import check_choice

_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


@remembers_arguments
class ImageMap(Embedder):
    """A map (B, C, h, w) as it is, or resized bilinearly to `size` pixels (a low-resolution image)."""

    def __init__(self, key: str, size: int | tuple[int, int] | None = None):
        super().__init__(key, "concat", 0.0)
        self.size = size

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        _check_map(self.key, values)
        return values if self.size is None else F.interpolate(values, self.size, mode="bilinear")


@remembers_arguments
class SpatialRescaler(Embedder):
    """A map (B, in_channels, H, W) -> rescaled `stages` times by `multiplier`, then its channels mixed by a
    1x1 convolution (`channel_mapper`) if `out_channels` is given. For semantic maps.
    """

    def __init__(
        self,
        key: str = "segmentation",
        stages: int = 1,
        method: Literal["nearest", "linear", "bilinear", "trilinear", "bicubic", "area"] = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
        kernel_size: int = 1,
    ):
        super().__init__(key, "concat", 0.0)
        check_choice("SpatialRescaler: method", method, _METHODS)
        if stages < 0:
            raise ValueError(f"SpatialRescaler: stages must not be negative, got {stages}")
        self.stages, self.method, self.multiplier = stages, method, multiplier
        self.channel_mapper = nn.Identity()
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(
                in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
            )

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        _check_map(self.key, values)
        for _ in range(self.stages):
            values = F.interpolate(values, scale_factor=self.multiplier, mode=self.method)
        mapper = self.channel_mapper
        return mapper(values.to(mapper.weight.dtype) if isinstance(mapper, nn.Conv2d) else values)


class _FirstStageMap(Embedder):
    """Needs the first stage of the model that it belongs to, which `LatentDiffusion` hands over."""

    def __init__(self, key: str):
        super().__init__(key, "concat", 0.0)
        self._owner: tuple[nn.Module, ...] = ()  # in a tuple, so as not to be registered as a part of this

    def attach(self, model: nn.Module) -> None:
        self._owner = (model,)

    @property
    def owner(self) -> nn.Module:
        if not self._owner:
            raise ValueError(f"{type(self).__name__} works as a part of a LatentDiffusion only")
        return self._owner[0]


@remembers_arguments
class EncodedImage(_FirstStageMap):
    """An image (B, C, H, W) in [-1, 1] -> its latent (B, c, H / f, W / f), as the first stage encodes it.

    `scaled`: shifted and scaled as the latents that are diffused (Stable Diffusion's inpainting), or as
    the first stage gives it (the original latent diffusion's). Of a posterior the mean is taken.
    """

    def __init__(self, key: str = "masked_image", scaled: bool = True):
        super().__init__(key)
        self.scaled = scaled

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        _check_map(self.key, values)
        with torch.no_grad():
            latent = self.owner.moments(values)[0]
        return self.owner.normalize(latent) if self.scaled else latent


@remembers_arguments
class Mask(_FirstStageMap):
    """A mask (B, 1, H, W) of an image -> its nearest values on the latent's grid (B, 1, H / f, W / f)."""

    def __init__(self, key: str = "mask"):
        super().__init__(key)

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        _check_map(self.key, values)
        factor = self.owner.first_stage_model.downsampling_factor
        return F.interpolate(values, (values.shape[-2] // factor, values.shape[-1] // factor), mode="nearest")


def _check_map(key: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or values.ndim != 4:
        raise ValueError(f"{key!r} must hold a map (B, C, H, W), got {tuple(getattr(values, 'shape', ()))}")
