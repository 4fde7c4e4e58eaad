"""The first stages: autoencoders with a KL-regularised or a vector-quantized latent, or none.

Section 3.1 and appendix G of Rombach et al. 2021 (arXiv:2112.10752).
"""

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.models.encoder_decoder import Decoder, Encoder, check_ddconfig
from ldm.models.gaussian import DiagonalGaussian
from ldm.models.quantize import VectorQuantizer, VQOutput

__all__ = [
    "AutoencoderKL",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "FirstStage",
    "IdentityFirstStage",
    "VQModel",
    "VQOutput",
    "VectorQuantizer",
]


class FirstStage(nn.Module):
    """What every autoencoder here has: encoder, decoder, 1x1 convolutions around the latent, and its sizes.

    `latent_channels`, `image_channels`, `downsampling_factor`; `last_layer` is the decoder's.
    """

    def __init__(self, ddconfig: dict, embed_dim: int, double_z: bool):
        super().__init__()
        ddconfig = dict(ddconfig)
        check_ddconfig(ddconfig)
        if ddconfig.get("double_z", True) != double_z:
            raise ValueError(f"ddconfig.double_z must be {double_z} for {type(self).__name__}")
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        width = 2 if double_z else 1
        z_channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(width * z_channels, width * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.latent_channels: int = embed_dim
        self.image_channels: int = ddconfig["in_channels"]
        self.downsampling_factor: int = self.encoder.factor

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.last_layer

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, latent_channels, h, w) -> image (B, out_ch, f * h, f * w)."""
        return self.decoder(self.post_quant_conv(z))


@remembers_arguments
class AutoencoderKL(FirstStage):
    """An autoencoder whose latent is a diagonal Gaussian, held loosely to N(0, 1) by the loss' KL term."""

    def __init__(self, ddconfig: dict, embed_dim: int):
        super().__init__(ddconfig, embed_dim, double_z=True)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images (B, C, H, W) in [-1, 1] -> the posterior over (B, embed_dim, H / f, W / f)."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction of `x` through a posterior sample, made with `noise` (standard normal) if given."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise)), posterior

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior: what a latent cache stores."""
        posterior = self.encode(x)
        return posterior.mean, posterior.std

    def decode_latent(self, z: Tensor) -> Tensor:
        return self.decode(z)


@remembers_arguments
class VQModel(FirstStage):
    """An autoencoder whose latent is quantized to a codebook of `n_embed` vectors; see `VectorQuantizer`.

    Latent diffusion works on the latent before quantization, and `decode_latent` quantizes (the paper's
    "VQ-reg").
    """

    def __init__(
        self,
        ddconfig: dict,
        n_embed: int,
        embed_dim: int,
        remap: str | list[int] | None = None,
        sane_index_shape: bool = False,
        legacy: bool = True,
        beta: float = 0.25,
        unknown_index: str | int = "random",
    ):
        super().__init__(ddconfig, embed_dim, double_z=False)
        self.quantize = VectorQuantizer(
            n_embed, embed_dim, beta, remap, unknown_index, sane_index_shape, legacy
        )

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the latent (B, embed_dim, H / f, W / f) before quantization."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> VQOutput:
        return self.quantize(self.encode_to_prequant(x))

    def decode_code(self, indices: Tensor, shape: tuple[int, int, int] | None = None) -> Tensor:
        """Indices (B, h, w), or flat ones with `shape` = (B, h, w) -> images."""
        return self.decode(self.quantize.embed(indices, shape))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, VQOutput]:
        """Reconstruction of `x` through its codes. Nothing is drawn: `noise` is accepted and not used."""
        output = self.encode(x)
        return self.decode(output.quantized), output

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latent before quantization, and zeros."""
        z = self.encode_to_prequant(x)
        return z, torch.zeros_like(z)

    def decode_latent(self, z: Tensor) -> Tensor:
        return self.decode(self.quantize(z).quantized)


@remembers_arguments
class IdentityFirstStage(nn.Module):
    """No first stage: the latent is the image, for diffusion in pixel space. It has no parameters."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.latent_channels = self.image_channels = channels
        self.downsampling_factor = 1

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, None]:
        return x, None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def decode_latent(self, z: Tensor) -> Tensor:
        return z
