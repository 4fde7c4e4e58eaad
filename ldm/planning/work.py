"""A run's own training step, on tensors without values; what it needs of data and of other runs is stood in
for by things with sizes alone."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm import config as configuration
from ldm.checkpoints import native
from ldm.checkpoints.originals.original_yaml import read_original
from ldm.checkpoints.originals.published import build_empty, translate
from ldm.checkpoints.trust import is_run_config
from ldm.config import signatures
from ldm.config.tree import ASSUMED, places_of
from ldm.planning.meter import Meter

#: Where nobody says: classes (ImageNet's, those of the embedded data), pixels, how much smaller latents are.
CLASSES, KNOWN_CLASSES = 1000, {"ldm.data.Digits": 10, "ldm.data.Emoji": 9}
SIZE, FACTOR = 256, 8


@dataclass
class Work:
    """A training step without values.

    title: what is trained, in words. training: its `TrainingSettings`.
    parts: everything that lies in memory, by name; first the network that is shown by layer.
    trained: what the optimizers train. averaged: what has a moving average.
    step(meter, batch): forward and backward of so many images.
    """

    title: str
    training: Any
    parts: dict[str, nn.Module]
    trained: list[nn.Parameter]
    averaged: list[nn.Parameter]
    step: Callable[[Meter, int], None]
    notes: list[str] = field(default_factory=list)

    @property
    def network(self) -> nn.Module:
        return next(iter(self.parts.values()))


def work_of_run(path: Path, overrides: Iterable[str], size: int | None, classes: int | None) -> Work:
    """The work of the run that a training config describes; `size` and `classes` stand for the data's.

    Raises:
        ValueError: mistakes in the config; something that cannot be planned without the data.
    """
    from ldm.training.methods import find_method
    from ldm.training.run import Run
    from ldm.training.run_config import load_run

    cfg, keys = load_run(path, overrides, assumed=_assumed_values(size))
    notes = _assumptions(cfg)
    classes = classes or KNOWN_CLASSES.get(cfg.data.target)

    class Planned(Run):
        def count_classes(self) -> int:
            note = f"{CLASSES} classes are assumed (--classes)"
            if classes is None and note not in notes:
                notes.append(note)
            return super().count_classes()

    size, channels = size or _of_data(cfg, "size"), _of_data(cfg, "channels")
    images = _Images(size, channels, classes or CLASSES)
    with torch.device("meta"):
        built = _first_stage(cfg, keys, path, channels, notes)
        run = Planned(cfg, keys, images, None, torch.device("meta"), rehearsal=True, built=built)
        method = find_method(keys.task).build(run).to("meta").train()
    trained = method.trained()

    def step(meter: Meter, count: int) -> None:
        batch = method.example(count)
        for place, loss in enumerate(method.losses()):
            if place and keys.training.accumulate == 1:  # the optimizer before has taken its step
                for parameter in trained[place - 1]:
                    parameter.grad = None
            meter.backward(loss(batch)[0])

    title = f"{keys.task} {keys.name!r}: images {channels}x{size}x{size}"
    sample = method.train_set[(0, 0)]
    if "mean" in sample:
        title += f", latents {'x'.join(map(str, sample['mean'].shape))}"
        notes.append("the latents are cached, so the first stage only lies in memory")
    optimized = [parameter for group in trained for parameter in group if parameter.requires_grad]
    averaged = [parameter for parameter in method.model.parameters() if parameter.requires_grad]
    return Work(title, keys.training, method.parts(), optimized, averaged, step, notes)


def _assumed_values(size: int | None) -> dict[str, Any]:
    """What a config may leave open."""
    return {"first_stage": None, "data.params.root": ".", "data.params.size": size or SIZE}


def _assumptions(cfg) -> list[str]:
    """What was filled in and decides the numbers."""
    size = (cfg.data.get("params") or {}).get("size")
    told = {
        "data.params.size": f"images of {size} pixels are assumed (--size)",
        "first_stage": f"first_stage is open: it is left out, and {FACTOR} times smaller sides are assumed; "
        "give first_stage=RUN, or an autoencoder's YAML: first_stage=configs/autoencoder/kl-f8.yaml",
    }
    return [text for path, text in told.items() if places_of(cfg).get(path) == ASSUMED]


def _of_data(cfg, name: str) -> int:
    """`size` or `channels` of the images, as the data set's params or their defaults say."""
    value = (cfg.data.get("params") or {}).get(name)
    if value is None:
        accepted = signatures.parameters(signatures.resolve_target(cfg.data.target, allow_foreign=True)) or {}
        value = accepted[name].default if name in accepted else None
    if not isinstance(value, int):
        option = " (--size)" if name == "size" else ""
        raise ValueError(f"the config does not say data.params.{name}, and the data is not asked{option}")
    return value


class _Images(Dataset):
    """As many images as one likes, on the meta device."""

    crop, flip, in_memory = "center", False, True

    def __init__(self, size: int, channels: int, classes: int):
        self.size, self.channels, self.classes = size, channels, [str(i) for i in range(classes)]

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, entry) -> dict[str, Tensor]:
        number = torch.zeros((), dtype=torch.long, device="meta")
        image = torch.empty(self.channels, self.size, self.size, device="meta")
        return {"image": image, "label": number, "index": number, "position": number}

    def fingerprint(self) -> str:
        return ""


class _OpenFirstStage(nn.Module):
    """A first stage of which nothing is known but the channels that the network takes."""

    downsampling_factor = FACTOR

    def __init__(self, image_channels: int, latent_channels: int):
        super().__init__()
        self.image_channels, self.latent_channels = image_channels, latent_channels

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        *_, height, width = images.shape
        shape = (len(images), self.latent_channels, height // FACTOR, width // FACTOR)
        return images.new_empty(shape), images.new_empty(shape)


def _first_stage(cfg, keys, path: Path, channels: int, notes: list[str]) -> dict[str, nn.Module]:
    """That of a diffusion run, by its key, without its weights; none for pixels and for other runs."""
    if places_of(cfg).get("first_stage") == ASSUMED:
        keys.first_stage = "first_stage"
        return {"first_stage": _OpenFirstStage(channels, cfg.network.params.in_channels)}
    source = getattr(keys, "first_stage", None)
    if source is None:
        return {}
    if keys.first_stage_config is not None:
        return {"first_stage": _of_yaml(Path(keys.first_stage_config))}
    file = Path(source)
    if not file.exists() and (planned := _config_of_run(file.name, path)) is not None:
        notes.append(f"first_stage {source} does not exist yet; it is planned as {planned} describes it")
        file = planned
    if file.suffix in (".yaml", ".yml"):
        return {"first_stage": _of_yaml(file)}
    file = file / native.MODEL_FILE if file.is_dir() else file
    if not file.exists():
        raise ValueError(f"first_stage {source}: there is no {file}, and it is no autoencoder's YAML either")
    description = native.read_description(file) if file.suffix == ".safetensors" else None
    part = (description or {}).get("model")
    if part is None:
        raise ValueError(f"first_stage {source}: {file} does not describe its model; give its run's YAML")
    part = part["params"].get("first_stage", part)
    return {"first_stage": native.build({"format": native.FORMAT, "model": part}, str(file))}


def _of_yaml(path: Path) -> nn.Module:
    from ldm.training.run_config import load_run

    if path.is_file() and not is_run_config(path):
        model = build_empty(translate(read_original(path)))
        return getattr(model, "first_stage_model", model)
    cfg, keys = load_run(path, assumed=_assumed_values(None))
    if keys.task != "autoencoder":
        raise ValueError(f"first_stage {path} is the config of a {keys.task} run, not of an autoencoder")
    return configuration.instantiate(cfg.model, allow_foreign=True)


def _config_of_run(name: str, around: Path) -> Path | None:
    """The YAML near this one whose run will have this name."""
    for path in sorted(around.resolve().parent.parent.glob("*/*.yaml")):
        if re.search(rf"^name:\s*{re.escape(name)}\s*$", path.read_text(encoding="utf-8"), re.MULTILINE):
            return Path(os.path.relpath(path))
    return None
