"""Descriptions of small latent diffusion models, of each kind that a diffusers folder holds differently."""

import torch
from diffusers_data import randomized

from ldm.checkpoints import native
from ldm.latent_diffusion import LatentDiffusion

DD = {
    "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 16, "ch_mult": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "num_groups": 8,
}  # fmt: skip
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"ddconfig": {**DD, "double_z": True}, "embed_dim": 3},
}
VQ = {
    "target": "ldm.models.autoencoder.VQModel",
    "params": {"ddconfig": {**DD, "double_z": False}, "n_embed": 32, "embed_dim": 3},
}
PIXELS = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {"channels": 3}}
NETWORK = {
    "in_channels": 3, "out_channels": 3, "model_channels": 16, "num_groups": 8, "num_res_blocks": 1,
    "channel_mult": [1, 2], "attention_resolutions": [2], "num_head_channels": 8,
}  # fmt: skip
CLASSES = ["cat", "dog", "owl"]
ENDS = {"schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}


def part(target: str, **params) -> dict:
    return {"target": target, "params": params}


def network(**params) -> dict:
    return part("ldm.models.unet.UNetModel", **{**NETWORK, **params})


def discrete(prediction: str = "eps", learned_variance: bool = False, **schedule) -> dict:
    schedule = part("ldm.diffusion.schedule.DiscreteSchedule", **{**ENDS, **schedule})
    return part(
        "ldm.diffusion.denoiser.Denoiser",
        schedule=schedule, prediction=prediction, learned_variance=learned_variance,
    )  # fmt: skip


def conditioner(embedder: str, **params) -> dict:
    return part("ldm.conditioning.Conditioner", embedders=[part(f"ldm.conditioning.{embedder}", **params)])


FLOW = part(
    "ldm.diffusion.denoiser.Denoiser", schedule=part("ldm.diffusion.schedule.FlowSchedule"), prediction="flow"
)
EDM = part(
    "ldm.diffusion.denoiser.Denoiser", schedule=part("ldm.diffusion.schedule.EDMSchedule"), prediction="edm"
)
#: name -> (parts, sampling defaults, latents' shift and scale).
MODELS = {
    "kl-class-tokens": (
        {"first_stage": KL, "network": network(context_dim=12), "denoiser": discrete(),
         "conditioner": conditioner("ClassEmbedder", num_classes=3, dim=12)},
        {"sampler": "ddim", "steps": 10, "spacing": "uniform", "guidance": 2.0},
        ([0.1, -0.3, 0.7], [1.3, 0.7, 0.11]),
    ),
    "kl-class-vector-flow": (
        {"first_stage": KL, "network": network(num_classes="sequential", adm_in_channels=6), "denoiser": FLOW,
         "conditioner": conditioner("ClassEmbedder", num_classes=3, dim=6, kind="vector")},
        {"sampler": "euler", "steps": 5},
        ([0.1, -0.3, 0.7], [1.3, 0.7, 0.11]),
    ),
    "kl-class-label-v": (
        {"first_stage": KL,
         "network": network(num_classes=4, resblock_updown=True, use_scale_shift_norm=True),
         "denoiser": discrete("v", zero_terminal_snr=True),
         "conditioner": conditioner("ClassLabel", num_classes=3)},
        {"sampler": "ddim", "steps": 10, "spacing": "trailing"},
        ([0.0], [0.18215]),
    ),
    "vq-unconditional": (
        {"first_stage": VQ, "network": network(), "denoiser": discrete()},
        {"sampler": "ddim", "steps": 10, "spacing": "uniform"},
        ([0.0], [1.7]),
    ),
    "vq-unconditional-normalised": (
        {"first_stage": VQ, "network": network(), "denoiser": EDM}, {}, ([0.1, -0.3, 0.7], [1.3, 0.7, 0.11]),
    ),
    "pixels-unconditional": (
        {"first_stage": PIXELS, "network": network(), "denoiser": discrete("x0", schedule="cosine")},
        {"sampler": "ddim", "steps": 10, "spacing": "uniform"},
        ([0.0], [1.0]),
    ),
    "pixels-learned-variance": (
        {"first_stage": PIXELS, "network": network(out_channels=6),
         "denoiser": discrete(learned_variance=True)},
        {"sampler": "ddpm", "steps": 10, "spacing": "leading"},
        ([0.0], [1.0]),
    ),
}  # fmt: skip


def description(name: str) -> dict:
    """What a native file says of the model."""
    parts, sampling, _ = MODELS[name]
    params = {"conditioner": None, **parts, "image_size": [16, 16]}
    return {
        "format": native.FORMAT,
        "model": {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params},
        "image_size": [16, 16],
        "classes": CLASSES if params["conditioner"] else None,
        "sampling": sampling,
        "weights": "ema",
        "step": 1234,
    }


def build(name: str, seed: int = 0) -> LatentDiffusion:
    """The model with random weights and its description."""
    described = description(name)
    model = randomized(native.build(described, name), seed)
    for buffer, values in zip((model.latent_shift, model.latent_scale), MODELS[name][2], strict=True):
        buffer.copy_(torch.tensor(values).reshape(-1, 1, 1).expand_as(buffer))
    return model
