"""Writing a model as a checkpoint of the original LDM, with its YAML beside it.

The state dict has the original's names and nothing else. A record of our own under the key "ldm" holds what
the original has no place for; with it `load_exported` gives back exactly what was written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import config as configuration
from ldm.checkpoints.building import build_filled
from ldm.checkpoints.description import Description
from ldm.checkpoints.originals.compvis_yaml import original_config
from ldm.checkpoints.strict import TABLES
from ldm.files import whole_file
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL
from ldm.weights.errors import CheckpointError
from ldm.weights.reading import Weights, read_weights

RECORD = "ldm"
RECORD_FORMAT = "ldm-compvis/1"
_LATENT = ("latent_shift", "latent_scale")
# Our beginning of a name -> the original's; all other names are the same.
_CONDITION = ("conditioner.embedders.0.", "cond_stage_model.")


def save_compvis(model: nn.Module, path: str | Path) -> Path:
    """Write FILE.ckpt and FILE.yaml; returns the YAML's path.

    Args:
        model: a first stage or a `LatentDiffusion`. A shift of the latents, or a scale for each channel, goes
            into the 1x1 convolutions around an AutoencoderKL's latent; the original has one scale_factor.

    Raises:
        NotExpressible: something that the original does not have, all of it named; nothing is written.
    """
    path = Path(path)
    description: Description | None = getattr(model, "description", None)
    replaced = _folded_latents(model)
    config = original_config(model, folded=bool(replaced))
    tensors = _renamed(model.state_dict(), *_CONDITION)
    record: dict[str, Any] = {"format": RECORD_FORMAT}
    if isinstance(model, LatentDiffusion):
        record |= {name: tensors.pop(name) for name in _LATENT}
        tensors |= model.denoiser.schedule.buffers_like_original()
    record["replaced"] = {name: tensors[name] for name in replaced}
    tensors |= replaced
    content = {"state_dict": tensors, "global_step": 0}
    if description is not None:
        content["global_step"] = description.step or 0
        content[RECORD] = {**record, "description": json.dumps(description.plain())}
    yaml = path.with_suffix(".yaml")
    with whole_file(path, durable=True) as file:
        torch.save(_without_slack(content), file)
    with whole_file(yaml, durable=True) as file:
        file.write(configuration.to_yaml(config).encode())
    return yaml


def is_exported(path: str | Path) -> bool:
    """Whether a checkpoint has a record of ours."""
    try:
        return isinstance(read_weights(path).extra.get(RECORD), dict)
    except CheckpointError:
        return False


def load_exported(path: str | Path, ema: bool = True) -> nn.Module:
    """The model in a checkpoint that `save_compvis` wrote (see `is_exported`), without the YAML.

    Raises:
        CheckpointError: the record is of another format, or keys are missing, extra or mis-shaped.
    """
    weights, where = read_weights(path), str(path)
    record = weights.extra[RECORD]
    if record.get("format") != RECORD_FORMAT:
        raise CheckpointError(
            where, f"has format {record.get('format')!r}; this version reads {RECORD_FORMAT!r}"
        )
    try:
        found = json.loads(record["description"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(where, f"its record {RECORD!r} is damaged: {error!r}") from error
    description = Description.read(found, where)
    description.check_weights(ema, where)
    return build_filled(description, lambda model: _our_tensors(model, weights, record), where, ignore=TABLES)


def _our_tensors(model: nn.Module, weights: Weights, record: Mapping) -> dict[str, Tensor]:
    """The state dict under our names, the latents' scale out of the weights again."""
    found = {**weights.tensors, **(record.get("replaced") or {})}
    if isinstance(model, LatentDiffusion):
        found |= {name: record[name] for name in _LATENT if name in record}
        found = _renamed(found, *reversed(_CONDITION))
    return found


def _renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The tensors, another beginning of names in place of one."""
    return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}


@torch.no_grad()
def _folded_latents(model: nn.Module) -> dict[str, Tensor]:
    """First-stage weights whose latents are normalised already; none where one scale_factor says it all.

    With z = (latent - shift) * scale: the mean's rows of quant_conv become scale * (W, b - shift), its
    log-variance moves by 2 ln(scale), and post_quant_conv gets W / scale and b + W shift.
    """
    if not isinstance(model, LatentDiffusion) or type(model.first_stage_model) is not AutoencoderKL:
        return {}
    shift, scale = (getattr(model, name).flatten().double() for name in _LATENT)
    if not shift.any() and (scale == scale[0]).all():
        return {}
    before, after = model.first_stage_model.quant_conv, model.first_stage_model.post_quant_conv
    weight, bias = before.weight.double().clone(), before.bias.double().clone()
    channels = len(shift)
    weight[:channels] *= scale.reshape(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - shift) * scale
    bias[channels:] += 2 * scale.log()
    out = after.weight.double()
    folded = {
        "quant_conv.weight": weight,
        "quant_conv.bias": bias,
        "post_quant_conv.weight": out / scale.reshape(1, -1, 1, 1),
        "post_quant_conv.bias": after.bias.double() + out.flatten(1) @ shift,
    }
    return {f"first_stage_model.{name}": tensor.to(before.weight.dtype) for name, tensor in folded.items()}


def _without_slack(value: Any) -> Any:
    """Tensors that own their memory alone: `torch.save` writes the whole storage that a view looks into."""
    if isinstance(value, dict):
        return {name: _without_slack(item) for name, item in value.items()}
    if isinstance(value, Tensor):
        own = value.detach().cpu()
        return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
    return value
