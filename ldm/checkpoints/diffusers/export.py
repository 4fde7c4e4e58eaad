"""Writing a model as a folder that diffusers opens.

A `LatentDiffusion` becomes a folder with one for each part, and a `model_index.json` where a pipeline of
diffusers does what the model does. What diffusers has no place for (the conditioner, names of classes, exact
shift and scale of the latents, defaults for sampling) stands in a note of our own, `ldm.json`, by which
`ldm.load` gives back exactly what was written.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.description import Description, NotExpressible
from ldm.checkpoints.diffusers import unet_writing, vae
from ldm.checkpoints.diffusers.model_config import CONFIG, DIFFUSERS_VERSION
from ldm.checkpoints.diffusers.names import places_of, to_diffusers
from ldm.checkpoints.diffusers.part import CLASS_TABLE
from ldm.checkpoints.diffusers.scheduler import scheduler_config
from ldm.conditioning import ClassEmbedder
from ldm.files import whole_file, whole_folder
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage, VQModel
from ldm.models.unet import UNetModel
from ldm.weights.writing import write_safetensors

NOTE = "ldm.json"
NOTE_FORMAT = "ldm-diffusers/1"
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONDITIONER = "conditioner/model.safetensors"
#: The network's layers that a table of class embeddings stands for, and where they lie in CONDITIONER.
TABLE_LAYERS, TABLE_PREFIX = "label_emb.", "network."


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
        for name in (*configs, *weights):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        for name, content in configs.items():
            with whole_file(fresh / name, durable=True) as file:
                file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        for name, tensors in weights.items():
            write_safetensors(fresh / name, tensors, {"format": "pt"})


def parts_of(model: LatentDiffusion) -> dict[str, tuple[str, nn.Module]]:
    """The folder of a part, as diffusers' pipelines name it -> (its name in the model, the part)."""
    parts, first_stage = {"unet": ("model.diffusion_model", model.network)}, model.first_stage_model
    if not isinstance(first_stage, IdentityFirstStage):
        parts["vqvae" if isinstance(first_stage, VQModel) else "vae"] = ("first_stage_model", first_stage)
    return parts


def folder_configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path within the folder -> JSON object, for every JSON file."""
    known: Description | None = getattr(model, "description", None)
    note = {"format": NOTE_FORMAT, "description": known.plain()} if known else {}
    if isinstance(model, LatentDiffusion):
        latents = {n: getattr(model, n).flatten().float().tolist() for n in ("latent_shift", "latent_scale")}
        configs = _model_configs(model, known.sampling if known else None, *latents.values())
        note |= latents
    elif isinstance(model, UNetModel):
        configs = {CONFIG: unet_writing.unet_config(model)}
    else:
        size = known.image_size if known else None
        config = vae.first_stage_config(model, max(size) if isinstance(size, list) else size)
        # Of an autoencoder alone no scale is known; left out, diffusers would take Stable Diffusion's.
        configs = {CONFIG: config | {"scaling_factor": 1.0}}
    configs = {name: {**config, "_diffusers_version": DIFFUSERS_VERSION} for name, config in configs.items()}
    return configs | ({NOTE: note} if known else {})


def _model_configs(
    model: LatentDiffusion, sampling: Mapping | None, shift: list[float], scale: list[float]
) -> dict[str, dict[str, Any]]:
    _, height, width = model.latent_shape
    table = class_table(model)
    rows, size = None if table is None else len(table), height if height == width else [height, width]
    unet, scheduler = (
        unet_writing.unet_config(model.network, size, rows),
        scheduler_config(model.denoiser, sampling),
    )
    configs = {f"unet/{CONFIG}": unet, SCHEDULER: scheduler}
    for name, (_, part) in parts_of(model).items():
        if part is model.first_stage_model:
            # A VQModel has a place for one number only. Where that is not all there is, it is left neutral.
            scales = vae.scale_config(shift, scale, one_number=isinstance(part, VQModel))
            configs[f"{name}/{CONFIG}"] = vae.first_stage_config(part, max(model.image_size)) | scales
    if isinstance(model.first_stage_model, IdentityFirstStage) and (set(shift), set(scale)) != ({0.0}, {1.0}):
        reasons = ["images are shifted and scaled without a first stage"]
        raise NotExpressible("diffusers has no place for it", reasons)
    # The pipeline that samples as this model is sampled here, if there is one.
    pipeline = {VQModel: "LDMPipeline", IdentityFirstStage: "DDIMPipeline"}.get(type(model.first_stage_model))
    sampled_alike = (unet["_class_name"], scheduler["_class_name"]) == ("UNet2DModel", "DDIMScheduler")
    unconditional = not len(model.conditioner.embedders) and model.network.num_classes is None
    one_scale = len(set(scale)) == 1 and set(shift) == {0.0}
    if pipeline and sampled_alike and unconditional and one_scale and height == width:
        classes = {name.split("/")[0]: ["diffusers", part["_class_name"]] for name, part in configs.items()}
        configs[INDEX] = {"_class_name": pipeline, **classes}
    return configs


def folder_weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Path within the folder -> tensors, for every file of weights."""
    if not isinstance(model, LatentDiffusion):
        return {WEIGHTS: to_diffusers(model.state_dict(), places_of(model))}
    tensors = {name: part.state_dict() for name, (_, part) in parts_of(model).items()}
    conditioner, table = dict(model.conditioner.state_dict()), class_table(model)
    if table is not None:
        moved = [name for name in tensors["unet"] if name.startswith(TABLE_LAYERS)]
        conditioner |= {f"{TABLE_PREFIX}{name}": tensors["unet"].pop(name) for name in moved}
    files = {
        f"{name}/{WEIGHTS}": to_diffusers(tensors[name], places_of(part))
        for name, (_, part) in parts_of(model).items()
    }
    if table is not None:
        files[f"unet/{WEIGHTS}"][CLASS_TABLE] = table
    return files | ({CONDITIONER: conditioner} if conditioner else {})


@torch.no_grad()
def class_table(model: LatentDiffusion) -> Tensor | None:
    """What the classes add to the time embedding through a projection that UNet2DModel lacks; else None.

    One row a class (the last: none). A function of the class alone, so a UNet2DModel with so many classes
    computes the same. In float32, then rounded to the type of the weights.
    """
    network, embedders = model.network, model.conditioner.embedders
    if not isinstance(network, UNetModel) or network.num_classes != "sequential" or len(embedders) != 1:
        return None
    by_class = isinstance(embedders[0], ClassEmbedder) and embedders[0].kind == "vector"
    if not by_class or unet_writing.has_transformers(network):
        return None
    rows = embedders[0].embedding.weight
    return copy.deepcopy(network.label_emb).float()(rows.float()).to(rows.dtype)
