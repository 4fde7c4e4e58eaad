"""A pipeline of diffusers as a `LatentDiffusion`: its UNet, first stage, scheduler, SD 1's text encoder."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints.building import build_filled
from ldm.checkpoints.description import Description, node
from ldm.checkpoints.diffusers import scheduler as schedulers
from ldm.checkpoints.diffusers import vae
from ldm.checkpoints.diffusers.export import INDEX, parts_of
from ldm.checkpoints.diffusers.model_config import CONFIG, explained, read_config
from ldm.checkpoints.diffusers.part import (
    FIRST_STAGES,
    NETWORKS,
    first_file,
    part_tensors,
    part_tree,
    prefixed,
)
from ldm.checkpoints.originals.compvis import latent_sizes
from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.reading import read_weights

log = logging.getLogger(__name__)

_FIRST_STAGE_NAMES = ("vae", "vqvae", "movq", "vqgan")  # of parts, in the pipelines of diffusers
_ENCODER, _TOKENIZER = "text_encoder", "tokenizer"
_END_OF_TEXT = "<|endoftext|>"
# Parameters of transformers' CLIPTextModel: theirs, ours.
_TEXT_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_length",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "hidden_act": "activation",
}


def load_pipeline(folder: Path, ema: bool) -> nn.Module:
    """The model of a folder with a `model_index.json`; what of it has no counterpart here is logged."""
    classes = {
        name: entry[1]
        for name, entry in read_config(folder / INDEX).items()
        if re.fullmatch(r"\w+", name) and isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    network = _only(folder, classes, NETWORKS, "network")
    first_stage = _only(folder, classes, FIRST_STAGES, "first stage", optional=True)
    scheduler = next((name for name in classes if name.endswith("scheduler")), "scheduler")
    conditioner, why_not = text_part(folder, classes)
    read = {network, first_stage, scheduler} | ({_ENCODER, _TOKENIZER} if conditioner else set())
    unread = [f"{name} ({kind})" for name, kind in classes.items() if name not in read]
    if unread and not conditioner:
        unread.append(f"since there is here: {why_not}; conditions are the caller's")
    configs = {name: read_config(folder / name / CONFIG) for name in (network, first_stage) if name}
    parts = {name: part_tree(config, str(folder / name / CONFIG)) for name, config in configs.items()}
    with explained(str(folder)):
        tree, sampling, lost = _model_tree(folder, parts, configs, network, first_stage, scheduler)
    tree["params"]["conditioner"] = conditioner
    for what, names in (("not read", unread), ("no counterpart here for", lost)):
        if names:
            log.warning("%s: %s: %s", folder, what, ", ".join(names))

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        found = {name: getattr(model, name) for name in ("latent_shift", "latent_scale")}
        for name, (prefix, module) in zip(configs, parts_of(model).values(), strict=True):
            found |= prefixed(prefix, part_tensors(folder / name, module, ema))
        if conditioner:
            found |= prefixed("conditioner.embedders.0.transformer", _text_tensors(folder))
        return found

    described = Description(tree, image_size=tree["params"]["image_size"], sampling=sampling)
    return build_filled(described, tensors, str(folder))


def _only(
    folder: Path, classes: Mapping[str, str], known: tuple, what: str, optional: bool = False
) -> str | None:
    """The one part of a pipeline whose class is among `known`."""
    found = [name for name, kind in classes.items() if kind in known]
    # A first stage of another class must not pass for none: latents would come out as if they were images.
    other = optional and any(name in _FIRST_STAGE_NAMES for name in classes)
    if len(found) == 1 or (optional and not found and not other):
        return found[0] if found else None
    has = ", ".join(f"{name} ({kind})" for name, kind in classes.items()) or "nothing"
    what = f"has {len(found) or 'no'} {what} of class {' or '.join(known)}; it has {has}"
    raise UnsupportedCheckpoint(str(folder / INDEX), what)


def _model_tree(
    folder: Path, parts: dict, configs: dict, network: str, first_stage: str | None, scheduler: str
) -> tuple[dict, dict, list[str]]:
    """(tree of the LatentDiffusion, defaults for sampling, what of the scheduler has no counterpart here)."""
    in_channels, out_channels = (parts[network]["params"][name] for name in ("in_channels", "out_channels"))
    stage = node("models.autoencoder.IdentityFirstStage", channels=in_channels)
    shift, scale = [0.0], [1.0]
    if first_stage:
        stage = parts[first_stage]
        with explained(str(folder / first_stage / CONFIG)):
            shift, scale = vae.latent_scale(configs[first_stage])
    channels, factor = latent_sizes(stage)
    if in_channels != channels:
        what = f"the network takes {in_channels} channels and the latents have {channels}"
        raise UnsupportedCheckpoint(str(folder), what)
    where = folder / scheduler / "scheduler_config.json"
    schedule = read_config(where)
    with explained(str(where)):
        learned = out_channels == 2 * channels
        denoiser = schedulers.denoiser_part(schedule, str(where), learned_variance=learned)
        sampling, lost = schedulers.sampling_defaults(schedule)
    size = configs[network].get("sample_size") or configs[network].get("image_size") or 32
    size = [size, size] if isinstance(size, int) else size
    tree = node(
        "latent_diffusion.LatentDiffusion",
        first_stage=stage,
        network=parts[network],
        denoiser=denoiser,
        image_size=[side * factor for side in size],
        latent_shift=shift if len(shift) > 1 else shift[0],
        latent_scale=scale if len(scale) > 1 else scale[0],
    )
    return tree, sampling, lost


def text_part(folder: Path, classes: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """(target and params of the conditioner that does what the pipeline does with texts or None, why not)."""
    kinds = [kind for name, kind in classes.items() if name.startswith(_ENCODER)]
    if kinds != ["CLIPTextModel"] or classes.get(_ENCODER) != "CLIPTextModel":
        return None, f"text encoders {', '.join(kinds)}" if kinds else "no text encoder"
    padding = _padding(folder / _TOKENIZER)
    if padding != _END_OF_TEXT:  # CLIPTextEmbedder's empty text is padded with the end of text, as SD 1's is
        return None, f"a tokenizer that pads with {padding!r}"
    where = folder / _ENCODER / CONFIG
    config = read_config(where)
    missing = [name for name in _TEXT_SIZES if name not in config]
    if missing:
        raise CorruptCheckpoint(str(where), f"lacks {', '.join(missing)}")
    if config["hidden_act"] not in ("gelu", "quick_gelu") or config.get("layer_norm_eps", 1e-5) != 1e-5:
        return None, f"hidden_act={config['hidden_act']!r}, layer_norm_eps={config.get('layer_norm_eps')}"
    sizes = {ours: config[theirs] for theirs, ours in _TEXT_SIZES.items()}
    tokenizer = str((folder / _TOKENIZER).resolve())
    embedder = node("conditioning.clip.CLIPTextEmbedder", **sizes, tokenizer=tokenizer)
    return node("conditioning.Conditioner", embedders=[embedder]), ""


def _text_tensors(folder: Path) -> dict[str, Tensor]:
    """The text encoder's weights under today's names, constant buffers left out."""
    tensors = read_weights(first_file(folder / _ENCODER, "model", "pytorch_model")).tensors
    # Later releases of transformers write the names without their beginning.
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith("position_ids")}


def _padding(folder: Path) -> str | None:
    """The token with which a tokenizer's folder says that texts are padded."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = read_config(folder / name).get("pad_token")
            if token is not None:
                return token.get("content") if isinstance(token, dict) else token
    return None
