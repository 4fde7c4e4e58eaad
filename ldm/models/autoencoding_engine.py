"""The first stage of Stability's generative-models: no 1x1 convolutions around the latent."""

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.models.encoder_decoder import Decoder, Encoder
from ldm.models.gaussian import DiagonalGaussian
from ldm.models.quantize import VectorQuantizer, VQOutput


@remembers_arguments
class AutoencodingEngine(nn.Module):
    """Encoder, regularizer, decoder; the encoder's output is the latent (its moments, with "kl").

    Args:
        encoder, decoder: arguments of `ldm.models.encoder_decoder.Encoder` and `Decoder`.
        regularizer: "kl", a diagonal Gaussian; "vq", a codebook; "none", the latent as it is.
        n_embed, beta, remap, unknown_index, sane_index_shape: of the `VectorQuantizer`, for "vq" only. The
            commitment term has the paper's weights, not the original latent diffusion's.

    Raises:
        ValueError: encoder, decoder and regularizer do not fit together.
    """

    def __init__(
        self,
        encoder: dict,
        decoder: dict,
        regularizer: Literal["kl", "vq", "none"] = "kl",
        n_embed: int | None = None,
        beta: float = 0.25,
        remap: str | list[int] | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
    ):
        super().__init__()
        if regularizer not in ("kl", "vq", "none"):
            raise ValueError(f"AutoencodingEngine: regularizer {regularizer!r} is none of kl, vq, none")
        double_z = encoder.get("double_z", True)
        if double_z != (regularizer == "kl"):
            raise ValueError(
                f"AutoencodingEngine: regularizer {regularizer!r} with encoder.double_z={double_z}"
            )
        if encoder["z_channels"] != decoder["z_channels"]:
            raise ValueError(
                f"AutoencodingEngine: the encoder has {encoder['z_channels']} z_channels, "
                f"the decoder {decoder['z_channels']}"
            )
        if (n_embed is not None) != (regularizer == "vq"):
            raise ValueError(f"AutoencodingEngine: n_embed={n_embed} with regularizer {regularizer!r}")
        self.regularizer = regularizer
        self.encoder = Encoder(**encoder)
        self.decoder = Decoder(**decoder)
        self.latent_channels: int = encoder["z_channels"]
        self.image_channels: int = encoder["in_channels"]
        self.downsampling_factor: int = self.encoder.factor
        if regularizer == "vq":
            self.quantize = VectorQuantizer(
                n_embed, self.latent_channels, beta, remap, unknown_index, sane_index_shape, legacy=False
            )

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.last_layer

    def encode(self, x: Tensor) -> DiagonalGaussian | VQOutput | Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the posterior, the quantized latent, or the latent."""
        z = self.encoder(x)
        if self.regularizer == "kl":
            return DiagonalGaussian(z)
        return self.quantize(z) if self.regularizer == "vq" else z

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the encoder's output (B, z, h, w) before the regularizer."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, latent_channels, h, w) -> images (B, out_ch, f * h, f * w)."""
        return self.decoder(z)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a latent cache stores: the posterior's mean and deviation; else the latent and zeros."""
        if self.regularizer == "kl":
            posterior = self.encode(x)
            return posterior.mean, posterior.std
        z = self.encoder(x)
        return z, torch.zeros_like(z)

    def decode_latent(self, z: Tensor) -> Tensor:
        """As `decode`; with a codebook, `z` is quantized first."""
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
