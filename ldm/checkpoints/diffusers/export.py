"""Writing a model as a folder that diffusers opens.

A first stage or a UNet becomes one folder of diffusers; a `LatentDiffusion` one with a folder for each part,
with a `model_index.json` where a pipeline of diffusers does what the model does. What diffusers has no place
for (the conditioner, names of classes, exact shift and scale of the latents, defaults for sampling) stands in
a note of our own, `ldm.json`, by which `ldm.load` gives back exactly what was written.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.description import Description, NotExpressible
from ldm.checkpoints.diffusers import scheduler as diffusers_scheduler
from ldm.checkpoints.diffusers import unet_writing as diffusers_unet
from ldm.checkpoints.diffusers import vae as diffusers_autoencoder
from ldm.checkpoints.diffusers.model_config import DIFFUSERS_VERSION
from ldm.checkpoints.diffusers.names import places_of, to_diffusers
from ldm.checkpoints.diffusers.part import CLASS_TABLE
from ldm.conditioning import ClassEmbedder
from ldm.files import whole_file, whole_folder
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage, VQModel
from ldm.models.unet import UNetModel
from ldm.weights.writing import write_safetensors

NOTE = "ldm.json"
NOTE_FORMAT = "ldm-diffusers/1"
INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONDITIONER = "conditioner/model.safetensors"
#: Where the layers lie that a table of class embeddings stands for, in the conditioner's file.
TABLE_PREFIX = "network."


def save_diffusers(model: nn.Module, folder: str | Path) -> None:
    """Write a model for diffusers; the folder appears whole or not at all.

    Args:
        model: a first stage, a UNet, or a `LatentDiffusion` of both.
        folder: must not exist, or be empty.

    Raises:
        NotExpressible: something that diffusers' classes do not have, all of it named; nothing is written.
        FileExistsError: there is something in the folder.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder")
    configs, weights = folder_configs(model), folder_weights(model)
    with whole_folder(folder) as fresh:
        for name, content in configs.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(fresh / name, durable=True) as file:
                file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        for name, tensors in weights.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(fresh / name, tensors, {"format": "pt"})


def folder_configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path within the folder -> JSON object, for every JSON file."""
    known: Description | None = getattr(model, "description", None)
    if isinstance(model, LatentDiffusion):
        configs = _model_configs(model, known.sampling if known else None)
    elif isinstance(model, UNetModel):
        configs = {CONFIG: diffusers_unet.unet_config(model)}
    else:
        size = known.image_size if known else None
        side = max(size) if isinstance(size, list) else size
        config = diffusers_autoencoder.first_stage_config(model, side)
        # Of an autoencoder alone no scale is known; left out, diffusers would take Stable Diffusion's.
        configs = {CONFIG: config | {"scaling_factor": 1.0}}
    configs = {name: {**config, "_diffusers_version": DIFFUSERS_VERSION} for name, config in configs.items()}
    if known is None:
        return configs
    note = {"format": NOTE_FORMAT, "description": known.plain()}
    if isinstance(model, LatentDiffusion):
        note |= dict(zip(("latent_shift", "latent_scale"), _latent_numbers(model), strict=True))
    return configs | {NOTE: note}


def _latent_numbers(model: LatentDiffusion) -> tuple[list[float], list[float]]:
    """The latents' shift and scale, one number a channel."""
    return tuple(t.flatten().float().tolist() for t in (model.latent_shift, model.latent_scale))


def _model_configs(model: LatentDiffusion, sampling: Mapping | None) -> dict[str, dict[str, Any]]:
    _, height, width = model.latent_shape
    sample_size = height if height == width else [height, width]
    table = class_table(model)
    rows = None if table is None else len(table)
    configs = {
        f"unet/{CONFIG}": diffusers_unet.unet_config(model.network, sample_size, rows),
        SCHEDULER: diffusers_scheduler.scheduler_config(model.denoiser, sampling),
    }
    shift, scale = _latent_numbers(model)
    first_stage = model.first_stage_model
    if not isinstance(first_stage, IdentityFirstStage):
        config = diffusers_autoencoder.first_stage_config(first_stage, max(model.image_size))
        # A VQModel has a place for one number only. Where that is not all there is, it is left neutral.
        one = isinstance(first_stage, VQModel)
        config |= diffusers_autoencoder.scale_config(shift, scale, one_number=one)
        configs[f"{first_stage_folder(first_stage)}/{CONFIG}"] = config
    elif (set(shift), set(scale)) != ({0.0}, {1.0}):
        reasons = ["images are shifted and scaled without a first stage"]
        raise NotExpressible("diffusers has no place for it", reasons)
    index = pipeline_index(model, configs, shift, scale)
    return configs | ({INDEX: index} if index else {})


def first_stage_folder(first_stage: nn.Module) -> str:
    """The name that diffusers' pipelines give to this part."""
    return "vqvae" if isinstance(first_stage, VQModel) else "vae"


def pipeline_index(
    model: LatentDiffusion, configs: Mapping[str, Mapping], shift: list[float], scale: list[float]
) -> dict[str, Any] | None:
    """`model_index.json` of the pipeline that samples as this model is sampled here; None if there is none.

    LDMPipeline: unconditional, a VQModel with one scale and no shift. DDIMPipeline: unconditional, in pixels.
    """
    network, scheduler = configs[f"unet/{CONFIG}"]["_class_name"], configs[SCHEDULER]["_class_name"]
    unconditional = not len(model.conditioner.embedders) and model.network.num_classes is None
    square = model.latent_shape[1] == model.latent_shape[2]
    one_scale = len(set(scale)) == 1 and set(shift) == {0.0}
    sampled_alike = (network, scheduler) == ("UNet2DModel", "DDIMScheduler")
    if not (unconditional and square and one_scale and sampled_alike):
        return None
    parts = {"unet": ["diffusers", network], "scheduler": ["diffusers", scheduler]}
    if isinstance(model.first_stage_model, VQModel):
        return {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"], **parts}
    if isinstance(model.first_stage_model, IdentityFirstStage):
        return {"_class_name": "DDIMPipeline", **parts}
    return None


def folder_weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Path within the folder -> tensors, for every file of weights."""
    if not isinstance(model, LatentDiffusion):
        return {WEIGHTS: to_diffusers(model.state_dict(), places_of(model))}
    conditioner = dict(model.conditioner.state_dict())
    tensors = model.network.state_dict()
    moved, table = moved_names(model), class_table(model)
    conditioner |= {f"{TABLE_PREFIX}{name}": tensors.pop(name) for name in moved}
    network = to_diffusers(tensors, places_of(model.network))
    files = {f"unet/{WEIGHTS}": network if table is None else {**network, CLASS_TABLE: table}}
    first_stage = model.first_stage_model
    if not isinstance(first_stage, IdentityFirstStage):
        written = to_diffusers(first_stage.state_dict(), places_of(first_stage))
        files[f"{first_stage_folder(first_stage)}/{WEIGHTS}"] = written
    return files | ({CONDITIONER: conditioner} if conditioner else {})


def moved_names(model: LatentDiffusion) -> list[str]:
    """Parameters of the network for `y`, where a table of class embeddings stands for them."""
    if not has_class_table(model):
        return []
    return [f"label_emb.{name}" for name, _ in model.network.label_emb.named_parameters()]


def has_class_table(model: LatentDiffusion) -> bool:
    """Whether the classes reach the network as a vector, through a projection that UNet2DModel lacks."""
    embedders = model.conditioner.embedders
    return (
        isinstance(model.network, UNetModel)
        and model.network.num_classes == "sequential"
        and not diffusers_unet.has_transformers(model.network)
        and len(embedders) == 1
        and isinstance(embedders[0], ClassEmbedder)
        and embedders[0].kind == "vector"
    )


@torch.no_grad()
def class_table(model: LatentDiffusion) -> Tensor | None:
    """What `has_class_table` models add to the time embedding, one row a class (the last: none); else None.

    A function of the class alone, so a UNet2DModel with so many classes computes the same. In float32, then
    rounded to the type of the weights.
    """
    if not has_class_table(model):
        return None
    rows = model.conditioner.embedders[0].embedding.weight
    return copy.deepcopy(model.network.label_emb).float()(rows.float()).to(rows.dtype)
