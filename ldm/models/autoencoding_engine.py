"""The first stage of Stability's generative-models: no 1x1 convolutions around the latent."""

from typing import Literal

from ldm.arguments import remembers_arguments
from ldm.models.autoencoder import FirstStage
from ldm.models.quantize import VectorQuantizer
from ldm.wording import check_choice


@remembers_arguments
class AutoencodingEngine(FirstStage):
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
        check_choice("AutoencodingEngine: regularizer", regularizer, ("kl", "vq", "none"))
        double_z, z_channels = encoder.get("double_z", True), encoder["z_channels"]
        z_decoded = decoder["z_channels"]
        if double_z != (regularizer == "kl"):
            raise ValueError(f"AutoencodingEngine: regularizer {regularizer!r}, encoder.double_z={double_z}")
        if (n_embed is None) == (regularizer == "vq"):
            raise ValueError(f"AutoencodingEngine: regularizer {regularizer!r}, n_embed={n_embed}")
        if z_channels != z_decoded:
            raise ValueError(f"AutoencodingEngine: {z_channels} z_channels encoded, {z_decoded} decoded")
        super().__init__(encoder, decoder, regularizer, z_channels)
        if regularizer == "vq":
            self.quantize = VectorQuantizer(
                n_embed, z_channels, beta, remap, unknown_index, sane_index_shape, legacy=False
            )
