"""Plans of what no training config describes: the YAML of a published model, or of a network alone."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from ldm import config as configuration
from ldm.checkpoints.originals.original_yaml import read_original, read_tree
from ldm.checkpoints.originals.published import build_empty, translate
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.encoder_unet import EncoderUNetModel
from ldm.models.vit import VisionTransformer
from ldm.planning.meter import Meter
from ldm.planning.work import Work

_IMAGES = 1_000_000  # for the time, where nobody says how long
_TOKENS = 77  # of a context of which nothing is known

Conditions = Callable[[int], dict[str, Tensor]]


def work_of_network(path: Path, overrides: Iterable[str], size: int | None) -> Work:
    """A step of the model of a YAML, trained on the mean square of what it gives.

    `overrides` change the YAML, `training.*` among them; `size` is the side of the network's input, or of the
    images of a whole diffusion model, whose network alone is trained.

    Raises:
        ConfigError: as `ldm.load` with this YAML.
        ValueError: nobody says how large the input is.
    """
    from ldm.training.settings import TrainingSettings

    try:
        tree = OmegaConf.merge(read_tree(path)[0], OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise configuration.ConfigError(f"{path}: {error}") from error
    given = OmegaConf.to_container(tree.pop("training", None) or OmegaConf.create())
    training = configuration.check_section(given, TrainingSettings, "training")
    notes = []
    if "steps" not in given:
        training.steps = max(1, _IMAGES // training.batch_size)
        notes.append(f"training on {_IMAGES:,} images is assumed (training.steps, training.batch_size)")
    translated = translate(read_original(tree))
    model, params = build_empty(translated), translated.node.get("params") or {}
    parts, images = {"network": model}, ""
    if isinstance(model, LatentDiffusion):
        conditioner = {"conditioner": model.conditioner.requires_grad_(False)}
        parts = {"network": model.network, **conditioner, "first stage": model.first_stage_model}
        if not model.conditioner.keys:
            del parts["conditioner"]
        shape, images = _inside(model, size)
        conditions = _conditions(model.network, model.conditioner, notes)
        notes.append("the network alone is trained, without gradients for the rest")
    else:
        shape = _shape(model, params, size)
        conditions = _conditions(model, None, notes)
    network = parts["network"].train()
    trained = [p for p in network.parameters() if p.requires_grad]
    timeless = hasattr(network, "decode_latent") or isinstance(network, VisionTransformer)

    def forward(batch: int) -> Tensor:
        times = [] if timeless else [torch.empty(batch, device="meta")]
        out = network(torch.empty(batch, *shape, device="meta"), *times, **conditions(batch))
        return out[0] if isinstance(out, tuple) else out

    def step(meter: Meter, batch: int) -> None:
        meter.backward(forward(batch).float().square().mean())  # by no name, so that it is freed in time

    title = (
        f"model {path.stem!r}: {images}input{' of the network' * bool(images)} {'x'.join(map(str, shape))}"
    )
    return Work(title, training, parts, trained, trained, step, notes)


def _shape(network: nn.Module, params: Mapping, size: int | None) -> tuple[int, int, int]:
    """(C, H, W) of the input of a network, or of an autoencoder, alone."""
    if hasattr(network, "decode_latent"):
        channels = network.image_channels
        known = (params.get("ddconfig") or params.get("encoder") or {}).get("resolution")
    elif hasattr(network, "patch_embed"):
        channels, known = network.patch_embed.in_channels, _sides(network.grid_size, network.patch_embed)
    elif hasattr(network, "in_channels"):
        channels, known = network.in_channels, params.get("image_size")
        known = _sides(network.grid_size, network.x_embedder) if hasattr(network, "grid_size") else known
    else:
        raise ValueError(f"a {type(network).__name__} is planned by the config of its run alone")
    sides = known if size is None else size
    if sides is None:
        raise ValueError("the YAML does not say how large the network's input is; give its side as --size")
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return channels, height, width


def _sides(grid: tuple[int, int], patches: Any) -> list[int]:
    return [count * side for count, side in zip(grid, patches.patch_size, strict=True)]


def _inside(model: LatentDiffusion, size: int | None) -> tuple[tuple[int, int, int], str]:
    """(C, H, W) of the input of a diffusion model's network, and its images in words."""
    factor = model.first_stage_model.downsampling_factor
    height, width = model.image_size if size is None else (size, size)
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} pixels are no multiple of the first stage's factor {factor}"
        )
    channels = getattr(model.network, "in_channels", model.latent_shape[0])
    images = f"images {model.first_stage_model.image_channels}x{height}x{width}, "
    return (channels, height // factor, width // factor), images


def _conditions(network: nn.Module, conditioner: nn.Module | None, notes: list[str]) -> Conditions:
    """What the conditioner gives where nothing is asked for, or else what the network's widths need."""

    def absent(batch: int) -> dict[str, Tensor]:
        found = conditioner.unconditional(batch, "meta")
        names = {"crossattn": "context", "vector": "y"}
        return {name: found[kind] for kind, name in names.items() if kind in found}

    if conditioner is not None and conditioner.keys:
        try:
            absent(1)
            return absent
        except (ValueError, NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            notes.append(f"the conditioner cannot run without data and is left out ({reason})")
    width, classes = getattr(network, "context_dim", None), getattr(network, "num_classes", None)
    if width is not None:
        notes.append(f"{_TOKENS} context tokens are assumed")
        width = width if isinstance(width, int) else list(width)[0]
    if isinstance(network, EncoderUNetModel | VisionTransformer):  # there it is the number of outputs
        classes = None

    def assumed(batch: int) -> dict[str, Tensor]:
        found = {}
        if width is not None:
            found["context"] = torch.empty(batch, _TOKENS, width, device="meta")
        if classes == "sequential":
            found["y"] = torch.empty(batch, network.adm_in_channels, device="meta")
        elif classes is not None:
            kind = torch.long if isinstance(classes, int) else torch.float32
            found["y"] = torch.empty(batch, dtype=kind, device="meta")
        return found

    return assumed
