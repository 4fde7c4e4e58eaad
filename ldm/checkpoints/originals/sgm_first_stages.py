"""The first stages in sgm's YAMLs, in our terms."""

from collections.abc import Callable

from torch import nn

from ldm.checkpoints.description import node
from ldm.checkpoints.originals import compvis
from ldm.checkpoints.originals.compvis import FIRST_STAGE_TRAINING
from ldm.checkpoints.originals.original_yaml import Part
from ldm.checkpoints.originals.translation import Shell, Translated, same, take_given, translated


def autoencoder_kl(part: Part, channels: int | None = None) -> Translated:
    _only_images(part)
    return compvis.autoencoder_kl(part)


def autoencoder_vq(part: Part, channels: int | None = None) -> Translated:
    params = {name: part.take(name) for name in ("ddconfig", "n_embed", "embed_dim")}
    params |= take_given(part, "sane_index_shape") | {"legacy": False}
    part.finish(*FIRST_STAGE_TRAINING)
    return Translated(node("models.autoencoder.VQModel", **params), _quantizer_view, averaged="")


def autoencoding_engine(part: Part, channels: int | None = None) -> Translated:
    params = {
        "encoder": _network_of(part.part("encoder_config"), "Encoder"),
        "decoder": _network_of(part.part("decoder_config"), "Decoder"),
        **translated(part, "regularizer_config", REGULARIZERS, "regularizer"),
    }
    _only_images(part)
    part.finish(*FIRST_STAGE_TRAINING)
    view = _quantizer_view if params["regularizer"] == "vq" else same
    return Translated(node("models.autoencoding_engine.AutoencodingEngine", **params), view, averaged="")


def _only_images(part: Part) -> None:
    part.only("additional_decode_keys", (None,), "decoders with further inputs are not supported")


def _quantizer_view(model: nn.Module) -> nn.Module:
    """sgm calls the quantizer `regularization`."""
    theirs = {"quantize": "regularization"}
    return Shell(**{theirs.get(name, name): module for name, module in model.named_children()})


def _network_of(part: Part, name: str) -> dict:
    target = f"sgm.modules.diffusionmodules.model.{name}"
    if part.target != target:
        part.refuse_target(target)
    return dict(part.params)  # the network itself holds them against its signature


def _kl(part: Part) -> dict:
    part.finish("sample")  # encode() gives the whole posterior
    return {"regularizer": "kl"}


def _vq(part: Part) -> dict:
    params = {"regularizer": "vq", "n_embed": part.take("n_e")}
    params |= take_given(part, "beta", "remap", "unknown_index", "sane_index_shape")
    part.only("embedding_weight_norm", (False,), "a codebook with weight norm is not supported")
    part.finish("e_dim", "log_perplexity", "loss_key")  # e_dim is z_channels
    return params


def _none(part: Part) -> dict:
    part.finish()
    return {"regularizer": "none"}


_REGULARIZERS = "sgm.modules.autoencoding.regularizers."
REGULARIZERS: dict[str, Callable[[Part], dict]] = {
    _REGULARIZERS + "DiagonalGaussianRegularizer": _kl,
    _REGULARIZERS + "quantize.VectorQuantizer": _vq,
    _REGULARIZERS + "IdentityRegularizer": _none,
}
FIRST_STAGES: dict[str, Callable[[Part, int | None], Translated]] = {
    "sgm.models.autoencoder.AutoencoderKL": autoencoder_kl,
    "sgm.models.autoencoder.AutoencoderKLInferenceWrapper": autoencoder_kl,
    "sgm.models.autoencoder.AutoencoderKLModeOnly": autoencoder_kl,
    "sgm.models.autoencoder.AutoencoderLegacyVQ": autoencoder_vq,
    "sgm.models.autoencoder.AutoencodingEngine": autoencoding_engine,
    "sgm.models.autoencoder.IdentityFirstStage": compvis.identity_first_stage,
}
