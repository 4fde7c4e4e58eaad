"""Stability-AI/generative-models (sgm): its YAMLs in our terms. Stable Diffusion 2.x, SDXL base and refiner.

Target names, parameters and their defaults are facts of that repository; Podell et al. 2023
(https://arxiv.org/abs/2307.01952).
"""

from collections.abc import Callable, Mapping

from torch import nn

from ldm.checkpoints.description import node
from ldm.checkpoints.originals import compvis, compvis_conditions
from ldm.checkpoints.originals.compvis import FIRST_STAGE_TRAINING, latent_sizes
from ldm.checkpoints.originals.original_yaml import Part, Translated

# Parameters of training and logging, and what is chosen when the model is loaded.
_ENGINE_IGNORED = """
    optimizer_config scheduler_config loss_fn_config ckpt_path use_ema ema_decay_rate input_key log_keys
    disable_first_stage_autocast no_cond_log compile_model en_and_decode_n_samples_a_time conditioner_config
"""


# First stages: (part, channels of the images if there is no encoder) -> Translated


def autoencoder_kl(part: Part, channels: int | None = None) -> Translated:
    _only_images(part)
    return compvis.autoencoder_kl(part)


def autoencoder_vq(part: Part, channels: int | None = None) -> Translated:
    needs, given = ("ddconfig", "n_embed", "embed_dim"), ("sane_index_shape",)
    ignored = FIRST_STAGE_TRAINING.split()
    stage = part.node("models.autoencoder.VQModel", *given, needs=needs, ignored=ignored, legacy=False)
    return Translated(stage, _quantizer_view, averaged="")


def autoencoding_engine(part: Part, channels: int | None = None) -> Translated:
    params = {
        "encoder": _network_of(part.part("encoder_config"), "Encoder"),
        "decoder": _network_of(part.part("decoder_config"), "Decoder"),
        **part.translated("regularizer_config", REGULARIZERS, "regularizer"),
    }
    _only_images(part)
    part.finish(*FIRST_STAGE_TRAINING.split())
    made = node("models.autoencoding_engine.AutoencodingEngine", **params)
    return Translated(made, _quantizer_view, averaged="")


def _only_images(part: Part) -> None:
    part.only("additional_decode_keys", (None,), "decoders with further inputs are not supported")


def _quantizer_view(model: nn.Module) -> nn.Module:
    """sgm calls the quantizer `regularization`."""
    theirs = {"quantize": "regularization"}
    return nn.ModuleDict({theirs.get(name, name): module for name, module in model.named_children()})


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
    params |= part.given("beta", "remap", "unknown_index", "sane_index_shape")
    part.only("embedding_weight_norm", (False,), "a codebook with weight norm is not supported")
    part.finish("e_dim", "log_perplexity", "loss_key")  # e_dim is z_channels
    return params


def _none(part: Part) -> dict:
    part.finish()
    return {"regularizer": "none"}


_REGULARIZERS, _STAGES = "sgm.modules.autoencoding.regularizers.", "sgm.models.autoencoder."
REGULARIZERS: dict[str, Callable[[Part], dict]] = {
    _REGULARIZERS + "DiagonalGaussianRegularizer": _kl,
    _REGULARIZERS + "quantize.VectorQuantizer": _vq,
    _REGULARIZERS + "IdentityRegularizer": _none,
}
FIRST_STAGES: dict[str, Callable[[Part, int | None], Translated]] = {
    _STAGES + "AutoencoderKL": autoencoder_kl,
    _STAGES + "AutoencoderKLInferenceWrapper": autoencoder_kl,
    _STAGES + "AutoencoderKLModeOnly": autoencoder_kl,
    _STAGES + "AutoencoderLegacyVQ": autoencoder_vq,
    _STAGES + "AutoencodingEngine": autoencoding_engine,
    _STAGES + "IdentityFirstStage": compvis.identity_first_stage,
}


# Networks


def unet(part: Part) -> Translated:
    """sgm's UNet has SpatialTransformers everywhere, with or without a context."""
    return compvis.unet(part, "offload_to_cpu", "use_fairscale_checkpoint", use_spatial_transformer=True)


NETWORKS = {"sgm.modules.diffusionmodules.openaimodel.UNetModel": unet}


# Conditions


def class_embedder(part: Part, key: str, kind: str) -> dict:
    params = {
        "num_classes": part.take("n_classes", 1000),
        "dim": part.take("embed_dim"),
        "kind": "crossattn" if part.take("add_sequence_dim", False) else "vector",
    }
    also = [key] if key != "label" else []
    return part.node("conditioning.vectors.ClassFeatures", **params, key="label", also=also, absent="zeros")


def open_clip_embedder2(part: Part, key: str, kind: str) -> dict:
    """FrozenOpenCLIPEmbedder2: with `legacy` as the first one, else without the last norm."""
    legacy, pooled = part.take("legacy", True), part.take("always_return_pooled", False)
    if legacy and pooled:
        part.problem("always_return_pooled", "needs legacy: False")
    return compvis_conditions.open_clip_embedder(part, key, kind, normed=legacy, pooled=pooled)


def sizes_embedder(part: Part, key: str, kind: str) -> dict:
    return part.node("conditioning.vectors.SinusoidalNumbers", key=key, dim=part.take("outdim"))


def spatial_rescaler(part: Part, key: str, kind: str) -> dict:
    part.only("wrap_video", (False,), "video is not supported")
    part.take("remap_output", None)  # so where out_channels is given
    return compvis_conditions.spatial_rescaler(part, key, kind, "kernel_size")


_ENCODERS = "sgm.modules.encoders.modules."
EMBEDDERS: dict[str, Callable[[Part, str, str], dict]] = {
    _ENCODERS + "ClassEmbedder": class_embedder,
    _ENCODERS + "FrozenCLIPEmbedder": compvis_conditions.clip_embedder,
    _ENCODERS + "FrozenOpenCLIPEmbedder": compvis_conditions.open_clip_embedder,
    _ENCODERS + "FrozenOpenCLIPEmbedder2": open_clip_embedder2,
    _ENCODERS + "ConcatTimestepEmbedderND": sizes_embedder,
    _ENCODERS + "SpatialRescaler": spatial_rescaler,
}


def conditioner(part: Part) -> dict:
    """GeneralConditioner. Without an `ucg_rate`, texts beside other embedders are absent as zeros, as sgm
    samples SDXL; a text alone is absent as the empty text, as it samples Stable Diffusion 2.
    """
    nodes, place = part.take("emb_models"), part.place("emb_models")
    parts = [Part(item, f"{place}.{i}", part.reading) for i, item in enumerate(nodes)]
    embedders = [_embedder(inner, len(nodes)) for inner in parts]
    part.finish()
    return node("conditioning.Conditioner", embedders=embedders, crossattn_merge="channels")


def _embedder(part: Part, count: int) -> dict:
    key, rate, legacy = (part.take_beside(name) for name in ("input_key", "ucg_rate", "legacy_ucg_value"))
    part.take_beside("is_trainable")
    if key is None:
        part.reading.problem(part.path, "has no input_key; several keys for one embedder are not supported")
    embedder = part.translator(EMBEDDERS, "embedder")(part, key or "", "crossattn")
    if embedder["target"].endswith("TextEmbedder"):
        if legacy not in (None, ""):
            part.problem_beside("legacy_ucg_value", f"is {legacy!r}; only the empty text is supported")
        embedder["params"]["absent"] = "zeros" if legacy is None and (rate or count > 1) else "empty"
    elif legacy is not None:
        part.problem_beside("legacy_ucg_value", "is supported for texts only")
    if rate:
        if embedder["target"].endswith("SpatialRescaler"):
            part.problem_beside("ucg_rate", "is not supported for maps")
        embedder["params"]["drop"] = rate
    return embedder


# Denoiser


def denoiser(part: Part, sampler: Mapping | None) -> dict:
    """Denoiser and DiscreteDenoiser with their scaling."""
    scaling = part.part("scaling_config")
    name = scaling.target.removeprefix("sgm.modules.diffusionmodules.denoiser_scaling.")
    discrete = part.target.endswith(".DiscreteDenoiser")
    supported = ("EpsScaling", "VScaling") if discrete else ("EDMScaling",)
    if name not in supported:
        scaling.refuse_target(f"{', '.join(supported)}, with {part.target.rpartition('.')[2]}")
    if discrete:
        params = {"prediction": {"VScaling": "v"}.get(name, "eps"), "schedule": _discrete_schedule(part)}
    else:
        params = {"prediction": "edm", "schedule": _edm_schedule(sampler)}
        params |= scaling.given("sigma_data")
    scaling.finish()
    part.finish("weighting_config")  # the loss
    return node("diffusion.denoiser.Denoiser", **params)


def _discrete_schedule(part: Part) -> dict:
    steps, table = part.take("num_idx"), part.part("discretization_config")
    if table.target != "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization":
        table.refuse_target("LegacyDDPMDiscretization")
    params = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
    params |= table.given("linear_start", "linear_end", num_timesteps="timesteps")
    table.finish()
    if steps != params["timesteps"]:
        part.problem("num_idx", f"is {steps}; only all of the {params['timesteps']} timesteps are supported")
    part.only("do_append_zero", (False,), "a noise level of zero is not supported")
    part.only("flip", (True,), "only ascending noise levels are supported")
    part.only("quantize_c_noise", (True,), "only times of the table are supported")
    return node("diffusion.schedule.DiscreteSchedule", schedule="linear", **params)


def _edm_schedule(sampler: Mapping | None) -> dict:
    """The range of sigma stands in the sampler's discretization, if anywhere."""
    found = ((sampler or {}).get("params") or {}).get("discretization_config") or {}
    given = found.get("params") or {} if str(found.get("target", "")).endswith(".EDMDiscretization") else {}
    ends = {name: given[name] for name in ("sigma_min", "sigma_max") if name in given}
    return node("diffusion.schedule.EDMSchedule", **ends)


DENOISERS = {
    "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser": denoiser,
    "sgm.modules.diffusionmodules.denoiser.Denoiser": denoiser,
}

# Sides in pixels at which models were published, which their YAMLs do not say.
_OF_VECTORS = {(2816, "eps"): 1024, (2560, "eps"): 1024}  # by (adm_in_channels, prediction)
_OF_TEXTS = {"eps": 512, "v": 768}


def image_size(network: Mapping, prediction: str, first: Mapping) -> int:
    """The side in pixels that sampling produces: the published one, else the first stage's resolution."""
    found = _OF_VECTORS.get((network.get("adm_in_channels"), prediction))
    if found is None and network.get("context_dim") == 1024 and network.get("num_classes") is None:
        found = _OF_TEXTS.get(prediction)
    encoder = first["params"].get("ddconfig") or first["params"].get("encoder") or {}
    return found or encoder.get("resolution", 32)


def diffusion_engine(part: Part) -> Translated:
    network = part.translated("network_config", NETWORKS, "network").node
    channels = network["params"].get("out_channels")
    first = part.translated("first_stage_config", FIRST_STAGES, "first stage", channels)
    sampler = part.take("sampler_config", None)
    denoise = part.translated("denoiser_config", DENOISERS, "denoiser", sampler)
    scale = part.take("scale_factor", 1.0)
    size = image_size(network["params"], denoise["params"]["prediction"], first.node)
    whole = node(
        "latent_diffusion.LatentDiffusion",
        first_stage=first.node,
        network=network,
        denoiser=denoise,
        image_size=size,
        latent_scale=scale,
    )
    if part.params.get("conditioner_config") is not None:
        found = part.translated("conditioner_config", CONDITIONERS, "conditioner")
        whole["params"]["conditioner"] = found
    wrapper = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"
    part.only("network_wrapper", (None, wrapper), "other wrappers are not supported")
    part.finish(*_ENGINE_IGNORED.split())
    side = size // latent_sizes(first.node)[1]
    part.reading.note(
        part.place(), f"the image size is not said: {size} pixels ({side} of latents) are taken"
    )

    def view(model: nn.Module) -> nn.Module:
        stage = first.view(model.first_stage_model)
        parts = {"model": model.model, "first_stage_model": stage, "conditioner": model.conditioner}
        return nn.ModuleDict(parts)

    return Translated(whole, view, averaged="model.", latent_scale=scale)


CONDITIONERS = {
    "sgm.modules.GeneralConditioner": conditioner,
    "sgm.modules.encoders.modules.GeneralConditioner": conditioner,
}
MODELS: dict[str, Callable[[Part], Translated]] = {
    "sgm.models.diffusion.DiffusionEngine": diffusion_engine,
    **FIRST_STAGES,
    **NETWORKS,
}
