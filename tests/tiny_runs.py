"""Run folders with tiny random models, for tests of what reads them."""

import copy
import json
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoints import native

CLASSES = ["cat", "dog", "red fox"]
SIZE = 16  # pixels; latents are 3x8x8

FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 3,
        "ddconfig": {
            "double_z": True,
            "z_channels": 3,
            "resolution": SIZE,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 8,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "attn_type": "none",
            "num_groups": 4,
        },
    },
}
FLOW = {
    "target": "ldm.diffusion.denoiser.Denoiser",
    "params": {"prediction": "flow", "schedule": {"target": "ldm.diffusion.schedule.FlowSchedule"}},
}
EPS = {
    "target": "ldm.diffusion.denoiser.Denoiser",
    "params": {
        "prediction": "eps",
        "schedule": {
            "target": "ldm.diffusion.schedule.DiscreteSchedule",
            "params": {"linear_start": 0.0015, "linear_end": 0.0195},
        },
    },
}


def network(conditional: bool = True, learned_variance: bool = False) -> dict:
    params = {
        "in_channels": 3,
        "out_channels": 6 if learned_variance else 3,
        "model_channels": 32,
        "channel_mult": [1],
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "num_head_channels": 16,
        # With one channel a group, the norm would take out again what an embedding adds.
        "use_scale_shift_norm": True,
    }
    params |= {"num_classes": "sequential", "adm_in_channels": 8} if conditional else {}
    return {"target": "ldm.models.unet.UNetModel", "params": params}


def class_embedder(**changes) -> dict:
    params = {"num_classes": len(CLASSES), "dim": 8, "kind": "vector", "drop": 0.1, **changes}
    return {"target": "ldm.conditioning.ClassEmbedder", "params": params}


def description(denoiser: dict = FLOW, conditional: bool = True, **changes) -> dict:
    """Of a diffusion model on the latents of `FIRST_STAGE`; `changes` replace entries."""
    learned = denoiser["params"].get("learned_variance", False)
    embedders = {"target": "ldm.conditioning.Conditioner", "params": {"embedders": [class_embedder()]}}
    found = {
        "format": native.FORMAT,
        "model": {
            "target": "ldm.latent_diffusion.LatentDiffusion",
            "params": {
                "first_stage": FIRST_STAGE,
                "network": network(conditional, learned),
                "denoiser": denoiser,
                "conditioner": embedders if conditional else None,
                "image_size": [SIZE, SIZE],
            },
        },
        "image_size": [SIZE, SIZE],
        "classes": CLASSES if conditional else None,
        "sampling": {"sampler": "euler", "steps": 2, "guidance": 2.0 if conditional else 1.0},
        "weights": "ema",
        "step": 2,
    }
    return copy.deepcopy(found | changes)


def first_stage_description() -> dict:
    return copy.deepcopy(
        {
            "format": native.FORMAT,
            "model": FIRST_STAGE,
            "image_size": [SIZE, SIZE],
            "classes": None,
            "sampling": None,
            "weights": "ema",
            "step": 2,
        }
    )


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random: freshly built networks end in zeros and would draw the same for every class."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Classes far apart, so that they show in the pixels.
            parameter.normal_(0.0, 5.0 if "embedding" in name else 0.15, generator=generator)
    return model


def save_run(folder: Path, described: dict, seed: int = 0, checkpoint: bool = False) -> Path:
    """A run folder with `model.safetensors` and, if asked for, a checkpoint with other raw weights."""
    model = randomized(native.build(described, "a test"), seed)
    folder.mkdir(parents=True)
    native.save_model(folder / native.MODEL_FILE, model.state_dict(), described)
    if checkpoint:
        raw = randomized(native.build(described, "a test"), seed + 1)
        (folder / "checkpoints").mkdir()
        state = {
            "format": native.FORMAT,
            "description": {k: v for k, v in described.items() if k not in ("weights", "step")},
            "step": 2,
            "model": raw.state_dict(),
            "ema": {name: value.detach().clone() for name, value in model.named_parameters()},
        }
        native.save_training(folder / "checkpoints" / "step-00000002.ckpt", state)
    return folder


def save_described(path: Path, described, tensors: dict | None = None) -> Path:
    """A .safetensors file with any description, also an impossible one; a str is written as it stands."""
    from safetensors.torch import save_file

    text = described if isinstance(described, str) else json.dumps(described)
    save_file(tensors or {"x": torch.zeros(1)}, path, {native.METADATA_KEY: text})
    return path
