"""The first stages: autoencoders with a KL-regularised or a vector-quantized latent, or none.

Section 3.1 and appendix G of Rombach et al. 2021 (arXiv:2112.10752).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.models.encoder_decoder import Decoder, Encoder, check_ddconfig
from ldm.models.gaussian import DiagonalGaussian
from ldm.models.quantize import VectorQuantizer, VQOutput


class FirstStage(nn.Module):
    """What every autoencoder has: encoder, decoder, its sizes, and how the latent is regularised.

    With "kl" the encoder's output is a posterior's moments, with "vq" it is quantized by `quantize`, which
    the subclass makes, with "none" it is the latent. `latent_channels`, `image_channels`,
    `downsampling_factor`; `last_layer` is the decoder's.
    """

    def __init__(
        self,
        encoder: dict,
        decoder: dict,
        regularizer: Literal["kl", "vq", "none"],
        latent_channels: int,
    ):
        super().__init__()
        self.regularizer = regularizer
        self.encoder = Encoder(**encoder)
        self.decoder = Decoder(**decoder)
        self.latent_channels: int = latent_channels
        self.image_channels: int = encoder["in_channels"]
        self.downsampling_factor: int = self.encoder.factor

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.last_layer

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the encoder's output (B, c or 2c, H / f, W / f)."""
        return self.encoder(x)

    def encode(self, x: Tensor) -> DiagonalGaussian | VQOutput | Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the posterior, the quantized latent, or the latent."""
        z = self.encode_to_prequant(x)
        if self.regularizer == "kl":
            return DiagonalGaussian(z)
        return self.quantize(z) if self.regularizer == "vq" else z

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, latent_channels, h, w) -> images (B, out_ch, f * h, f * w)."""
        return self.decoder(z)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a latent cache stores: the posterior's mean and deviation; else the latent before quantization
        and zeros."""
        if self.regularizer == "kl":
            posterior = self.encode(x)
            return posterior.mean, posterior.std
        z = self.encode_to_prequant(x)
        return z, torch.zeros_like(z)

    def decode_latent(self, z: Tensor) -> Tensor:
        """As `decode`; with a codebook, `z` is quantized first (the paper's "VQ-reg")."""
        return self.decode(self.quantize(z).quantized if self.regularizer == "vq" else z)

    def forward(
        self, x: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, DiagonalGaussian | VQOutput | None]:
        """(reconstruction, posterior | VQOutput | None); a posterior is sampled with `noise` where given."""
        encoded = self.encode(x)
        if self.regularizer == "kl":
            return self.decode(encoded.sample(noise)), encoded
        if self.regularizer == "vq":
            return self.decode(encoded.quantized), encoded
        return self.decode(encoded), None


class _CompVisFirstStage(FirstStage):
    """With 1x1 convolutions around the latent, and one `ddconfig` for both halves."""

    def __init__(self, ddconfig: dict, embed_dim: int, regularizer: Literal["kl", "vq"]):
        check_ddconfig(ddconfig)
        double_z = regularizer == "kl"
        if ddconfig.get("double_z", True) != double_z:
            raise ValueError(f"ddconfig.double_z must be {double_z} for {type(self).__name__}")
        super().__init__(ddconfig, ddconfig, regularizer, embed_dim)
        width, z_channels = 2 if double_z else 1, ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(width * z_channels, width * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


@remembers_arguments
class AutoencoderKL(_CompVisFirstStage):
    """An autoencoder whose latent is a diagonal Gaussian, held loosely to N(0, 1) by the loss' KL term."""

    def __init__(self, ddconfig: dict, embed_dim: int):
        super().__init__(ddconfig, embed_dim, "kl")


@remembers_arguments
class VQModel(_CompVisFirstStage):
    """An autoencoder whose latent is quantized to a codebook of `n_embed` vectors; see `VectorQuantizer`."""

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
        super().__init__(ddconfig, embed_dim, "vq")
        self.quantize = VectorQuantizer(
            n_embed, embed_dim, beta, remap, unknown_index, sane_index_shape, legacy
        )

    def decode_code(self, indices: Tensor, shape: tuple[int, int, int] | None = None) -> Tensor:
        """Indices (B, h, w), or flat ones with `shape` = (B, h, w) -> images."""
        return self.decode(self.quantize.embed(indices, shape))


@remembers_arguments
class IdentityFirstStage(nn.Module):
    """No first stage: the latent is the image, for diffusion in pixel space. It has no parameters."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.latent_channels = self.image_channels = channels
        self.downsampling_factor = 1

    def encode(self, x: Tensor) -> Tensor:
        return x

    decode = decode_latent = encode

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, None]:
        return x, None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)
