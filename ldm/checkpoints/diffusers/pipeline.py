"""A pipeline of diffusers as a `LatentDiffusion`: its UNet, first stage, scheduler, SD 1's text encoder."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ldm.checkpoints.building import build_filled
from ldm.checkpoints.description import Description
from ldm.checkpoints.diffusers import scheduler as diffusers_scheduler
from ldm.checkpoints.diffusers import text_encoder as diffusers_text
from ldm.checkpoints.diffusers import vae as diffusers_autoencoder
from ldm.checkpoints.diffusers.export import CONFIG, INDEX
from ldm.checkpoints.diffusers.model_config import explained, read_config
from ldm.checkpoints.diffusers.part import FIRST_STAGES, NETWORKS, part_tensors, part_tree, prefixed
from ldm.checkpoints.diffusers.text_encoder import ENCODER, TOKENIZER
from ldm.weights.errors import UnsupportedCheckpoint

log = logging.getLogger(__name__)

_FIRST_STAGE_NAMES = ("vae", "vqvae", "movq", "vqgan")  # of parts, in the pipelines of diffusers


def load_pipeline(folder: Path, ema: bool) -> nn.Module:
    """The model of a folder with a `model_index.json`; see `ldm.checkpoints.diffusers.folder.load_diffusers`.

    What is not read, and what of the scheduler has no counterpart here, is logged.
    """
    index = read_config(folder / INDEX)
    classes = {
        name: entry[1]
        for name, entry in index.items()
        if re.fullmatch(r"\w+", name) and isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    network = _only(folder, classes, NETWORKS, "network")
    first_stage = _only(folder, classes, FIRST_STAGES, "first stage", optional=True)
    scheduler = next((name for name in classes if name.endswith("scheduler")), "scheduler")
    conditioner, why_not = diffusers_text.text_part(folder, classes)
    read = {network, first_stage, scheduler} | ({ENCODER, TOKENIZER} if conditioner else set())
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
        own = part_tensors(folder / network, model.network, configs[network], ema)
        found |= prefixed("model.diffusion_model", own)
        if first_stage:
            own = part_tensors(folder / first_stage, model.first_stage_model, configs[first_stage], ema)
            found |= prefixed("first_stage_model", own)
        return found | (prefixed("conditioner", diffusers_text.text_tensors(folder)) if conditioner else {})

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
    raise UnsupportedCheckpoint(
        str(folder / INDEX), f"has {len(found) or 'no'} {what} of class {' or '.join(known)}; it has {has}"
    )


def _model_tree(
    folder: Path, parts: dict, configs: dict, network: str, first_stage: str | None, scheduler: str
) -> tuple[dict, dict, list[str]]:
    """(tree of the LatentDiffusion, defaults for sampling, what of the scheduler has no counterpart here)."""
    in_channels, out_channels = (parts[network]["params"][name] for name in ("in_channels", "out_channels"))
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {"channels": in_channels}}
    channels, factor, shift, scale = in_channels, 1, [0.0], [1.0]
    if first_stage:
        params = parts[first_stage]["params"]
        dd = params.get("ddconfig") or params["encoder"]
        channels, factor = params.get("embed_dim", dd["z_channels"]), 2 ** (len(dd["ch_mult"]) - 1)
        with explained(str(folder / first_stage / CONFIG)):
            shift, scale = diffusers_autoencoder.latent_scale(configs[first_stage])
    if in_channels != channels:
        raise UnsupportedCheckpoint(
            str(folder),
            f"the network takes {in_channels} channels and the latents have {channels}: it wants masks or "
            "images beside them, which have no part in the folder to make them",
        )
    where = folder / scheduler / "scheduler_config.json"
    schedule = read_config(where)
    with explained(str(where)):
        denoiser = diffusers_scheduler.denoiser_part(
            schedule, str(where), learned_variance=out_channels == 2 * channels
        )
        sampling, lost = diffusers_scheduler.sampling_defaults(schedule)
    size = configs[network].get("sample_size") or configs[network].get("image_size") or 32
    size = [size, size] if isinstance(size, int) else size
    params = {
        "first_stage": parts[first_stage] if first_stage else identity,
        "network": parts[network],
        "denoiser": denoiser,
        "conditioner": None,
        "image_size": [side * factor for side in size],
        "latent_shift": shift if len(shift) > 1 else shift[0],
        "latent_scale": scale if len(scale) > 1 else scale[0],
    }
    return {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}, sampling, lost
