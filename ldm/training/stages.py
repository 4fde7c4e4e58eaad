"""From a checked config to what a run needs: data, model, task, pictures."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from ldm import config as configuration
from ldm.checkpoints import native
from ldm.conditioning import Conditioner
from ldm.config.other_runs import not_repeated
from ldm.data.latents.cache import BESIDE_LATENTS
from ldm.latent_diffusion import LatentDiffusion
from ldm.losses import AutoencoderLoss
from ldm.training.autoencoder import AutoencoderTask
from ldm.training.classifier_stage import classifier_stage
from ldm.training.diffusion import DiffusionTask
from ldm.training.encoders import load_encoders
from ldm.training.first_stage import (
    FILE,
    cached_and_normalised,
    find_first_stage,
    keep_first_stage,
    load_first_stage,
)
from ldm.training.networks import channels_last
from ldm.training.pictures import Reconstructions, Samples
from ldm.training.run_config import AutoencoderRun, ClassifierRun, DiffusionRun, RunConfig, fill_classes
from ldm.training.shift import fill_shift, filled_shift
from ldm.training.stage import Stage, build_data, identity_of, start_from

log = logging.getLogger(__name__)

#: What a diffusion model is made of besides its first stage.
PARTS = ("network", "denoiser", "conditioner")


def build_stage(run: RunConfig, cfg, device: torch.device, resuming: bool = False, rehearsal: bool = False):
    """The stage of a config.

    Args:
        device: where the first stage encodes.
        resuming: a checkpoint's weights are loaded next, so none are looked for elsewhere.
        rehearsal: for a trial of one step: latents are neither cached nor measured.
    """
    if isinstance(run, AutoencoderRun):
        return autoencoder_stage(run, cfg, resuming)
    if isinstance(run, ClassifierRun):
        return classifier_stage(run, cfg, resuming)
    return diffusion_stage(run, cfg, device, resuming, rehearsal)


def autoencoder_stage(run: AutoencoderRun, cfg, resuming: bool) -> Stage:
    train, validation = build_data(run, cfg)
    fill_classes(cfg, train.classes)
    torch.manual_seed(run.seed)
    model = channels_last(configuration.instantiate(cfg.model, allow_foreign=True))
    loss = channels_last(configuration.instantiate(cfg.loss, allow_foreign=True))
    _check_images(model, train)
    _check_discriminator(loss, train)
    if run.init_from is not None and not resuming:
        start_from(model, run.init_from, cfg)
    description = {
        "format": native.FORMAT,
        "model": configuration.to_plain(cfg.model),
        "image_size": [train.size, train.size],
        "classes": train.classes,
        "sampling": None,
    }
    task = AutoencoderTask(model, loss, run.training, run.seed)
    draw = Reconstructions(validation or train, run.logging.images)
    return Stage(train, validation, task, description, identity_of(train), draw)


def _check_images(model: nn.Module, train: Dataset) -> None:
    factor, size = model.downsampling_factor, train.size
    if size % factor:
        raise ValueError(
            f"data.params.size {size} is not a multiple of the autoencoder's downsampling factor {factor}"
        )
    if train.channels != model.image_channels:
        raise ValueError(
            f"the images have {train.channels} channels, the autoencoder takes {model.image_channels}; set "
            f"data.params.channels={model.image_channels}, or the autoencoder's in_channels and out_ch"
        )


def _check_discriminator(loss: AutoencoderLoss, train: Dataset) -> None:
    """What would otherwise come up when the discriminator wakes, which may be hours into a run."""
    if not loss.uses_discriminator:
        return
    network = loss.discriminator
    if network.input_nc != train.channels:
        raise ValueError(
            f"loss.params.disc_in_channels is {network.input_nc}, the images have {train.channels} channels"
        )
    if train.size < network.smallest:
        raise ValueError(
            f"data.params.size {train.size} is too small for the discriminator, which takes "
            f"{network.smallest} and more; lower loss.params.disc_num_layers, or set "
            "loss.params.disc_weight=0 for none"
        )
    if loss.disc_conditional and loss.disc_num_classes != len(train.classes or []):
        raise ValueError(
            f"loss.params.disc_num_classes is {loss.disc_num_classes}, the data has "
            f"{len(train.classes or [])} classes"
        )


def diffusion_stage(
    run: DiffusionRun, cfg, device: torch.device, resuming: bool, rehearsal: bool = False
) -> Stage:
    source = find_first_stage(run, resuming)
    train, validation = build_data(run, cfg)
    first_stage, first_stage_part = load_first_stage(source, train.channels, run.first_stage_config)
    _check_images(first_stage, train)
    if not resuming and (lacks := not_repeated(run, cfg)):
        said = ", ".join(lacks)
        log.warning("note: the first stage was trained with %s, which this config does not say", said)
    fill_classes(cfg, train.classes)
    size = [train.size, train.size]
    model = _build_model(run, cfg, first_stage, size)
    fill_shift(cfg, model.latent_shape)
    run.sampling = replace(run.sampling, shift=filled_shift(run.sampling.shift, model.latent_shape))
    _check_conditions(model.conditioner, train, run.cached)
    if run.init_from is None and not resuming:
        load_encoders(model.conditioner)
    draw = Samples(run.sampling, run.logging.images, train.classes, run.seed, validation or train)
    draw.rehearse(model)
    if run.init_from is not None and not resuming:
        _start_from_diffusion(model, run.init_from, cfg)
    params = {name: configuration.to_plain(cfg.get(name)) for name in PARTS}
    description = {
        "format": native.FORMAT,
        "model": {
            "target": "ldm.latent_diffusion.LatentDiffusion",
            "params": {"first_stage": first_stage_part, **params, "image_size": size},
        },
        "image_size": size,
        "classes": train.classes,
        "sampling": asdict(run.sampling),
    }
    identity = identity_of(train)
    if not rehearsal:
        known = resuming or run.init_from is not None
        train, validation = cached_and_normalised(run, model, [train, validation], device, known)
    objective = configuration.instantiate(cfg.objective, allow_foreign=True, denoiser=model.denoiser)
    task = DiffusionTask(model, objective, run.training, run.seed)

    def keep(folder: Path) -> None:
        if source not in (None, folder / FILE):
            keep_first_stage(folder, first_stage, first_stage_part)

    return Stage(train, validation, task, description, identity, draw, keep)


def _check_conditions(conditioner: Conditioner, train: Dataset, cached: bool) -> None:
    if "label" in conditioner.keys and not train.classes:
        raise ValueError(
            "the conditioner reads labels, but the data has no classes (one subfolder a class makes them)"
        )
    for embedder in conditioner.embedders if cached else ():
        if not {embedder.key, *embedder.also} & set(BESIDE_LATENTS):
            raise ValueError(
                f"the conditioner's {type(embedder).__name__} reads {embedder.key!r}, but cached latents are "
                "without the images they were made from; set cache=false, which encodes every batch anew"
            )


def _build_model(run: DiffusionRun, cfg, first_stage: nn.Module, size: list[int]) -> LatentDiffusion:
    torch.manual_seed(run.seed)
    parts = {
        name: configuration.instantiate(cfg[name], allow_foreign=True) if cfg.get(name) else None
        for name in PARTS
    }
    return channels_last(LatentDiffusion(first_stage, image_size=size, **parts))


def _start_from_diffusion(model: LatentDiffusion, path: str, cfg) -> None:
    """Weights of another run, which must have been trained in the same latents."""
    wanted = native.fingerprint(model.first_stage_model.state_dict())
    start_from(model, path, cfg)
    if native.fingerprint(model.first_stage_model.state_dict()) != wanted:
        raise ValueError(
            f"init_from {path} was trained in the latents of another first stage than first_stage; give the "
            f"first stage of that run"
        )
