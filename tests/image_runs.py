"""Tiny models that are conditioned on images, for tests."""

import copy

import tiny_runs
import training_runs

ENCODER = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 0}


def image_embedder(encoder: dict | None = None, **changes) -> dict:
    """Of `ENCODER`, with `encoder` put in; other arguments are the embedder's."""
    model = {"target": "ldm.models.vit.VisionTransformer", "params": ENCODER | (encoder or {})}
    params = {"model": model, "drop": 0.2, **changes}
    return {"target": "ldm.conditioning.ImageEmbedder", "params": params}


def conditioner(*embedders: dict) -> dict:
    return copy.deepcopy({"target": "ldm.conditioning.Conditioner", "params": {"embedders": list(embedders)}})


def image_description(classes: bool = False) -> dict:
    """Of a diffusion model for `tiny_runs.save_run`, conditioned on images and, if asked for, classes."""
    described = tiny_runs.description(conditional=classes)
    params = described["model"]["params"]
    params["network"]["params"]["context_dim"] = ENCODER["embed_dim"]
    embedders = [image_embedder(), *[tiny_runs.class_embedder()] * classes]
    params["conditioner"] = conditioner(*embedders)
    described["sampling"]["guidance"] = 2.0
    return described


def image_config(images, runs, first_stage, embedders: list[dict], **changes) -> dict:
    """Of a training run with these embedders, latents of three channels; `changes` replace sections."""
    config = copy.deepcopy(training_runs.diffusion_config(images, runs, first_stage))
    params = config["network"]["params"]
    params |= {"in_channels": 3, "out_channels": 3, "context_dim": ENCODER["embed_dim"]}
    if len(embedders) == 1:
        del params["num_classes"], params["adm_in_channels"]
    config |= {"cache": False, "conditioner": conditioner(*embedders), **changes}
    config["training"]["optimizer"]["decay"] = "constant"
    config["logging"] |= {"images": 4, "images_every": 2, "validate_every": 2}
    return config
