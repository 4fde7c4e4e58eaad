"""The networks of a training config, built on the meta device, and one step of each kind of run.

Nothing is read but configs and descriptions of models: no weights, no data.
"""

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm import config as configuration
from ldm.checkpoints import native
from ldm.checkpoints.originals.original_yaml import read_original
from ldm.checkpoints.originals.published import build_empty, translate
from ldm.checkpoints.trust import is_run_config
from ldm.config import signatures
from ldm.config.tree import ASSUMED, places_of
from ldm.losses import AutoencoderLoss
from ldm.losses.efficientnet import EfficientNetPerceptual
from ldm.losses.lpips import LPIPS
from ldm.planning.meter import Meter


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for.

    size: of the images in pixels, None for the config's. classes: how many, where the data would be asked;
    None for what is known of an embedded data set, else 1000.
    memory: of one GPU in GiB. tflops: its peak in 1e12 FLOPs a second, of which `utilisation` is reached.
    depth: of the table of layers, None for what suits the task. config: the YAML.
    """

    config: Path | None = None
    size: int | None = None
    classes: int | None = None
    memory: float = 24.0
    tflops: float = 165.0
    utilisation: float = 0.4
    depth: int | None = None


@dataclass
class Work:
    """A run's step on tensors without values.

    parts: everything that lies in memory. networks: those whose forward pass is shown by layer.
    trained: what the optimizers train. averaged: the part that has a moving average.
    step(meter, batch): forward and backward of so many images.
    """

    parts: dict[str, nn.Module]
    networks: dict[str, nn.Module]
    trained: list[nn.Parameter]
    averaged: list[nn.Parameter]
    step: Callable[[Meter, int], None]
    shape: str
    depth: int = 1
    notes: list[str] = field(default_factory=list)


#: Classes where nobody says how many: ImageNet's; and those of the data sets that come in packages.
_CLASSES, _KNOWN_CLASSES = 1000, {"ldm.data.Digits": 10, "ldm.data.Emoji": 9}


def assumed_values(request: PlanRequest) -> dict[str, Any]:
    return {"first_stage": None, "data.params.root": ".", "data.params.size": request.size or 256}


def assumptions(cfg) -> list[str]:
    """What was filled in and decides the numbers."""
    filled = {path for path, place in places_of(cfg).items() if place == ASSUMED}
    notes = []
    if "data.params.size" in filled:
        notes.append(f"images of {cfg.data.params.size} pixels are assumed (--size)")
    if "first_stage" in filled:
        notes.append(
            "first_stage is open: it is left out, and 8 times smaller sides are assumed; give "
            "first_stage=RUN, or an autoencoder's YAML: first_stage=configs/autoencoder/kl-f8.yaml"
        )
    return notes


def _of_data(cfg, name: str, given: int | None = None) -> int:
    """`size` or `channels` of the images, as the data set's params or their defaults say."""
    if given is not None:
        return given
    value = (cfg.data.get("params") or {}).get(name)
    if value is None:
        accepted = signatures.parameters(signatures.resolve_target(cfg.data.target, allow_foreign=True)) or {}
        value = accepted[name].default if name in accepted else None
    if not isinstance(value, int):
        option = " (--size)" if name == "size" else ""
        raise ValueError(f"the config does not say data.params.{name}, and the data is not asked{option}")
    return value


def _filled(cfg, request: PlanRequest, work_notes: list[str]) -> None:
    """`num_classes: auto` becomes the number asked for."""
    from ldm.training.run_config import fill_classes

    if "num_classes: auto" not in configuration.to_yaml(cfg):
        return
    count = request.classes or _KNOWN_CLASSES.get(cfg.data.target)
    if count is None:
        count = _CLASSES
        work_notes.append(f"{count} classes are assumed (--classes)")
    fill_classes(cfg, [str(i) for i in range(count)])


# -- the kinds of run --------------------------------------------------------------------------------------


def _trainable(*modules: nn.Module) -> list[nn.Parameter]:
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def _autoencoder_work(cfg, run, request: PlanRequest) -> Work:
    notes: list[str] = []
    _filled(cfg, request, notes)
    size, channels = _of_data(cfg, "size", request.size), _of_data(cfg, "channels")
    model = configuration.instantiate(cfg.model, allow_foreign=True)
    loss = _loss(cfg.loss)
    began = getattr(loss, "disc_start", 0)
    trained = _trainable(model)
    adversary = list(loss.discriminator_parameters())

    def step(meter: Meter, batch: int) -> None:
        x = torch.empty(batch, channels, size, size, device="meta")
        condition = None
        if loss.disc_conditional:
            condition = torch.empty(batch, dtype=torch.long, device="meta")
        reconstruction, encoded = model(x)
        meter.backward(loss.generator_loss(x, reconstruction, encoded, began, model.last_layer, condition)[0])
        if loss.uses_discriminator:
            if run.training.accumulate == 1:  # the autoencoder's optimizer has taken its step
                for parameter in trained:
                    parameter.grad = None
            meter.backward(loss.discriminator_loss(x, reconstruction.detach(), began, condition)[0])

    factor = model.downsampling_factor
    latent = f"{model.latent_channels}x{size // factor}x{size // factor}"
    parts = {"autoencoder": model, **dict(loss.named_children())}
    if adversary:
        notes.append("the discriminator takes part, as it does from disc_start on")
    return Work(
        parts,
        {"": model},
        [*trained, *loss.autoencoder_parameters(), *adversary],
        trained,
        step,
        f"images {channels}x{size}x{size}, latents {latent}",
        depth=2,
        notes=notes,
    )


def _loss(part) -> nn.Module:
    """The objective, its perceptual network without the published weights."""
    target = signatures.resolve_target(part.target, allow_foreign=True)
    params = configuration.to_plain(part.get("params") or {})
    if target is not AutoencoderLoss:
        return configuration.instantiate(part, allow_foreign=True)
    default = inspect.signature(AutoencoderLoss).parameters["perceptual"].default
    networks = {"lpips": LPIPS, "efficientnet": EfficientNetPerceptual}
    choice = params.get("perceptual", default)
    unweighted = networks[choice](pretrained=False) if choice in networks else choice
    return AutoencoderLoss(**{**params, "perceptual": unweighted})


def _classifier_work(cfg, run, request: PlanRequest) -> Work:
    notes: list[str] = []
    _filled(cfg, request, notes)
    size, channels = _of_data(cfg, "size", request.size), _of_data(cfg, "channels")
    model = configuration.instantiate(cfg.model, allow_foreign=True)

    def step(meter: Meter, batch: int) -> None:
        logits = model(torch.empty(batch, channels, size, size, device="meta"))
        meter.backward(F.cross_entropy(logits.float(), torch.empty(batch, dtype=torch.long, device="meta")))

    trained = _trainable(model)
    shape = f"images {channels}x{size}x{size}"
    return Work({"classifier": model}, {"": model}, trained, trained, step, shape, notes=notes)


def _diffusion_work(cfg, run, request: PlanRequest) -> Work:
    notes: list[str] = []
    _filled(cfg, request, notes)
    size, channels = _of_data(cfg, "size", request.size), _of_data(cfg, "channels")
    network = configuration.instantiate(cfg.network, allow_foreign=True)
    first_stage = _first_stage(run.first_stage, run.first_stage_config, request, notes)
    if first_stage is not None:
        first_stage.requires_grad_(False)
        latent_channels, factor = first_stage.latent_channels, first_stage.downsampling_factor
    else:
        open_stage = places_of(cfg).get("first_stage") == ASSUMED
        latent_channels, factor = (network.in_channels, 8) if open_stage else (channels, 1)
    if size % factor:
        raise ValueError(f"images of {size} pixels are no multiple of the first stage's {factor}")
    in_channels = getattr(network, "in_channels", latent_channels)
    side = size // factor
    conditioner = _conditioner(cfg.get("conditioner"), notes)
    conditions = Conditions(network, conditioner, notes)
    cached = run.cache and run.first_stage is not None

    def step(meter: Meter, batch: int) -> None:
        if first_stage is not None and not cached:
            with torch.no_grad():
                first_stage.moments(torch.empty(batch, channels, size, size, device="meta"))
        z = torch.empty(batch, in_channels, side, side, device="meta")
        out = network(z, torch.empty(batch, device="meta"), **conditions(batch))
        meter.backward(out.float().square().mean())

    parts = {"network": network, "conditioner": conditioner, "first stage": first_stage}
    parts = {name: part for name, part in parts.items() if part is not None}
    trained = _trainable(*(part for name, part in parts.items() if name != "first stage"))
    if first_stage is not None:
        notes.append(
            "the latents are cached, so the first stage only lies in memory"
            if cached
            else "the first stage encodes every batch (cache: false)"
        )
    shape = f"images {channels}x{size}x{size}, latents {latent_channels}x{side}x{side}"
    return Work(parts, {"": network}, trained, trained, step, shape, notes=notes)


def _first_stage(
    source: str | None, config: str | None, request: PlanRequest, notes: list[str]
) -> nn.Module | None:
    """The autoencoder of a run folder, of a file or of an autoencoder's YAML, without its weights."""
    if source is None:
        return None
    if config is not None:
        return _planned_first_stage(Path(config))
    path = Path(source)
    if not path.exists() and (planned := _config_of_run(path.name, request.config)) is not None:
        notes.append(f"first_stage {source} does not exist yet; it is planned as {planned} describes it")
        path = planned
    if path.suffix in (".yaml", ".yml"):
        return _planned_first_stage(path)
    file = path / native.MODEL_FILE if path.is_dir() else path
    if not file.exists():
        raise ValueError(
            f"first_stage {source}: there is no {file}; the YAML of an autoencoder does as well, for example "
            "first_stage=configs/autoencoder/kl-f8.yaml"
        )
    description = native.read_description(file) if file.suffix == ".safetensors" else None
    part = (description or {}).get("model")
    if part is None:
        raise ValueError(
            f"first_stage {source}: {file} does not say what its model is; give the YAML of its run"
        )
    part = part["params"].get("first_stage", part)
    return native.build({"format": native.FORMAT, "model": part}, str(file))


def _planned_first_stage(path: Path) -> nn.Module:
    from ldm.training.run_config import load_run

    if path.is_file() and not is_run_config(path):
        model = build_empty(translate(read_original(path)))
        return getattr(model, "first_stage_model", model)
    cfg, run = load_run(path, assumed=assumed_values(PlanRequest()))
    if run.task != "autoencoder":
        raise ValueError(f"first_stage {path} is the config of a {run.task} run, not of an autoencoder")
    return configuration.instantiate(cfg.model, allow_foreign=True)


def _config_of_run(name: str, config: Path | None) -> Path | None:
    """The YAML whose run will have this name, among those around the config that is planned."""
    around = config.resolve().parent.parent.glob("*/*.yaml") if config is not None else ()
    for path in sorted(around):
        if re.search(rf"^name:\s*{re.escape(name)}\s*$", path.read_text(encoding="utf-8"), re.MULTILINE):
            return Path(os.path.relpath(path))
    return None


def _conditioner(part, notes: list[str]) -> nn.Module | None:
    if not part:
        return None
    try:
        return configuration.instantiate(part, allow_foreign=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        notes.append(
            f"the conditioner cannot be built without its weights and is left out ({_first_line(error)})"
        )
        return None


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


WORK = {"autoencoder": _autoencoder_work, "classifier": _classifier_work, "diffusion": _diffusion_work}
