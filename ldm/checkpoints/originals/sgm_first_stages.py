"""The first stages in sgm's YAMLs, in our terms."""

from collections.abc import Callable

from torch import nn

from ldm.checkpoints.originals import compvis
from ldm.checkpoints.originals.compvis import FIRST_STAGE_TRAINING
from ldm.checkpoints.originals.original_yaml import Part
from ldm.checkpoints.originals.translation import Shell, Translated, lookup, same, take_given

AUTOENCODER_TRAINING = FIRST_STAGE_TRAINING | {
    "loss_config": "the loss and its discriminator",
    "ckpt_engine": "the weights come from the checkpoint that is loaded",
    "input_key": "the batch key of training",
    "optimizer_config": "training",
    "trainable_ae_params": "training",
    "ae_optimizer_args": "training",
    "trainable_disc_params": "training",
    "disc_optimizer_args": "training",
    "disc_start_iter": "training",
    "diff_boost_factor": "display",
    "max_batch_size": "how many images are encoded at a time",
}


def autoencoder_kl(part: Part, channels: int | None = None) -> Translated:
    part.ignore(AUTOENCODER_TRAINING)
    part.only("additional_decode_keys", (None,), "decoders with further inputs are not supported")
    return compvis.autoencoder_kl(part)


def autoencoder_vq(part: Part, channels: int | None = None) -> Translated:
    part.ignore(AUTOENCODER_TRAINING)
    params = {name: part.take(name) for name in ("ddconfig", "n_embed", "embed_dim")}
    params |= take_given(part, {"sane_index_shape": "sane_index_shape"}) | {"legacy": False}
    part.finish()
    return Translated(
        {"target": "ldm.models.autoencoder.VQModel", "params": params}, _quantizer_view, averaged=""
    )


def autoencoding_engine(part: Part, channels: int | None = None) -> Translated:
    encoder = _network_of(part.part("encoder_config"), "Encoder")
    decoder = _network_of(part.part("decoder_config"), "Decoder")
    regularizer = part.part("regularizer_config")
    params = {"encoder": encoder, "decoder": decoder} | lookup(regularizer, REGULARIZERS, "regularizer")(
        regularizer
    )
    part.ignore(AUTOENCODER_TRAINING)
    part.only("additional_decode_keys", (None,), "decoders with further inputs are not supported")
    part.finish()
    view = _quantizer_view if params["regularizer"] == "vq" else same
    return Translated(
        {"target": "ldm.models.autoencoding_engine.AutoencodingEngine", "params": params}, view, averaged=""
    )


def identity_first_stage(part: Part, channels: int | None = None) -> Translated:
    part.ignore(AUTOENCODER_TRAINING)
    return compvis.identity_first_stage(part, channels)


def _quantizer_view(model: nn.Module) -> nn.Module:
    """sgm calls the quantizer `regularization`."""
    modules = {
        {"quantize": "regularization"}.get(name, name): module for name, module in model.named_children()
    }
    return Shell(**modules)


def _network_of(part: Part, name: str) -> dict:
    target = f"sgm.modules.diffusionmodules.model.{name}"
    if part.target != target:
        part.reading.problem(f"{part.path}.target", f"{part.target!r} is not supported (known: {target})")
    return dict(part.params)  # the network itself holds them against its signature


def _kl(part: Part) -> dict:
    part.ignore({"sample": "encode() gives the whole posterior"})
    part.finish()
    return {"regularizer": "kl"}


def _vq(part: Part) -> dict:
    names = ("beta", "remap", "unknown_index", "sane_index_shape")
    params = {"regularizer": "vq", "n_embed": part.take("n_e")} | take_given(
        part, {name: name for name in names}
    )
    part.only("embedding_weight_norm", (False,), "a codebook with weight norm is not supported")
    part.ignore({"e_dim": "is z_channels", "log_perplexity": "logging", "loss_key": "logging"})
    part.finish()
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
    "sgm.models.autoencoder.IdentityFirstStage": identity_first_stage,
}
