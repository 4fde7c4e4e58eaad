"""Plans of what no training config describes: the YAML of a published model, or of a network alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
from ldm.planning.work import PlanRequest, Work

_IMAGES = 1_000_000  # for the time, where nobody says how long


@dataclass
class NetworkRun:
    """In the place of a training config: how such a network would be trained."""

    task: str
    name: str
    training: Any
    notes: list[str] = field(default_factory=list)


def read_network(path: Path, overrides: Iterable[str]) -> tuple[nn.Module, Mapping, NetworkRun]:
    """The model of a YAML on the meta device, its `{target, params}`, and its run.

    `overrides` change the YAML, `training.*` among them.

    Raises:
        ConfigError: as `ldm.load` with this YAML.
    """
    from ldm.training.settings import TrainingSettings

    tree, _ = read_tree(path)
    try:
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise configuration.ConfigError(f"{path}: {error}") from error
    section = tree.pop("training", None)
    given = {} if section is None else OmegaConf.to_container(section)
    training = configuration.check_section(given, TrainingSettings, "training")
    notes = []
    if "steps" not in given:
        training.steps = max(1, _IMAGES // training.batch_size)
        notes.append(f"training on {_IMAGES:,} images is assumed (training.steps, training.batch_size)")
    translated = translate(read_original(tree))
    model = build_empty(translated)
    return model, translated.node, NetworkRun("model", path.stem, training, notes)


def network_work(model: nn.Module, node: Mapping, run: NetworkRun, request: PlanRequest) -> Work:
    """A step of that model, trained on the mean square of what it gives.

    Raises:
        ValueError: nobody says how large its input is.
    """
    if isinstance(model, LatentDiffusion):
        return _whole(model, run, request)
    params = node.get("params") or {}
    if hasattr(model, "decode_latent"):
        ddconfig = params.get("ddconfig") or params.get("encoder") or {}
        shape = _shape(model.image_channels, request, ddconfig.get("resolution"))
        return _work(model, run, lambda batch: model(_empty(batch, shape))[0], shape, depth=2)
    if isinstance(model, VisionTransformer):
        sides = [n * p for n, p in zip(model.grid_size, model.patch_embed.patch_size, strict=True)]
        shape = _shape(model.patch_embed.in_channels, request, sides)
        return _work(model, run, lambda batch: model(_empty(batch, shape)), shape)
    if not hasattr(model, "in_channels"):
        raise ValueError(f"a {type(model).__name__} is planned by the config of its run alone")
    known = params.get("image_size")
    if hasattr(model, "grid_size"):
        known = [n * p for n, p in zip(model.grid_size, model.x_embedder.patch_size, strict=True)]
    shape = _shape(model.in_channels, request, known)
    # A classifier of noisy images takes the time and nothing else.
    conditions = None if isinstance(model, EncoderUNetModel) else Conditions(model, None, run.notes)

    def forward(batch: int) -> Tensor:
        given = conditions(batch) if conditions else {}
        return model(_empty(batch, shape), _empty(batch, ()), **given)

    return _work(model, run, forward, shape)


def _whole(model: LatentDiffusion, run: NetworkRun, request: PlanRequest) -> Work:
    """The network of a diffusion model; its first stage and its conditioner lie in memory beside it."""
    conditioner = model.conditioner if model.conditioner.keys else None
    model.conditioner.requires_grad_(False)
    conditions = Conditions(model.network, conditioner, run.notes)
    factor = model.first_stage_model.downsampling_factor
    height, width = model.image_size if request.size is None else (request.size, request.size)
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} pixels are no multiple of the first stage's factor {factor}"
        )
    shape = (getattr(model.network, "in_channels", model.latent_shape[0]), height // factor, width // factor)
    parts = {"network": model.network, "conditioner": conditioner, "first stage": model.first_stage_model}
    run.notes.append("the network alone is trained, without gradients for the rest")

    def forward(batch: int) -> Tensor:
        return model.network(_empty(batch, shape), _empty(batch, ()), **conditions(batch))

    work = _work(model.network, run, forward, shape)
    work.parts = {name: part for name, part in parts.items() if part is not None}
    work.shape = (
        f"images {model.first_stage_model.image_channels}x{height}x{width}, input of the network "
        + ("x".join(map(str, shape)))
    )
    return work


def _work(network: nn.Module, run: NetworkRun, forward: Callable, shape: tuple, depth: int = 1) -> Work:
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]

    def step(meter: Meter, batch: int) -> None:
        meter.backward(forward(batch).float().square().mean())

    text = f"input {'x'.join(map(str, shape))}"
    return Work({"network": network}, {"": network}, trained, trained, step, text, depth, run.notes)


def _empty(batch: int, shape: tuple) -> Tensor:
    return torch.empty(batch, *shape, device="meta")


def _shape(channels: int, request: PlanRequest, known: Any) -> tuple[int, int, int]:
    sides = known if request.size is None else request.size
    if sides is None:
        raise ValueError("the YAML does not say how large the network's input is; give its side as --size")
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return channels, height, width


class Conditions:
    """What the conditioner gives where nothing is asked for, or else what the network's widths need."""

    TOKENS = 77

    def __init__(self, network: nn.Module, conditioner: nn.Module | None, notes: list[str]):
        self.network, self.conditioner = network, conditioner
        if conditioner is not None:
            try:
                self(1)
            except (ValueError, NotImplementedError, RuntimeError) as error:
                notes.append(
                    f"the conditioner cannot run without data and is left out ({_first_line(error)})"
                )
                self.conditioner = None
        if self.conditioner is None and getattr(network, "context_dim", None) is not None:
            notes.append(f"{self.TOKENS} context tokens are assumed")

    def __call__(self, batch: int) -> dict[str, Tensor]:
        if self.conditioner is None:
            return self._of_the_network(batch)
        found = self.conditioner.unconditional(batch, "meta")
        return {
            name: found[kind] for name, kind in (("context", "crossattn"), ("y", "vector")) if kind in found
        }

    def _of_the_network(self, batch: int) -> dict[str, Tensor]:
        context_dim = getattr(self.network, "context_dim", None)
        num_classes = getattr(self.network, "num_classes", None)
        conditions = {}
        if context_dim is not None:
            width = context_dim if isinstance(context_dim, int) else list(context_dim)[0]
            conditions["context"] = torch.empty(batch, self.TOKENS, width, device="meta")
        if num_classes == "sequential":
            conditions["y"] = torch.empty(batch, self.network.adm_in_channels, device="meta")
        elif num_classes is not None:
            kind = torch.long if isinstance(num_classes, int) else torch.float32
            conditions["y"] = torch.empty(batch, dtype=kind, device="meta")
        return conditions


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
