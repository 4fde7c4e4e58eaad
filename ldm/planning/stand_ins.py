"""What stands in for data, weights and runs that a plan does not ask for: things with sizes and no values."""

import os
import re
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

#: Classes where nobody says how many: ImageNet's; and those of the data sets that come in packages.
CLASSES, KNOWN_CLASSES = 1000, {"ldm.data.Digits": 10, "ldm.data.Emoji": 9}
#: How much smaller latents are where the first stage is open.
FACTOR = 8
SIZE = 256


class Images(Dataset):
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


class OpenFirstStage(nn.Module):
    """A first stage of which nothing is known but the channels that the network takes."""

    downsampling_factor = FACTOR

    def __init__(self, image_channels: int, latent_channels: int):
        super().__init__()
        self.image_channels, self.latent_channels = image_channels, latent_channels

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        *_, height, width = images.shape
        shape = (len(images), self.latent_channels, height // FACTOR, width // FACTOR)
        return images.new_empty(shape), images.new_empty(shape)

    def decode_latent(self, latent: Tensor) -> Tensor:
        *_, height, width = latent.shape
        return latent.new_empty(len(latent), self.image_channels, height * FACTOR, width * FACTOR)


def of_data(cfg, name: str, given: int | None = None) -> int:
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


def first_stage(source: str, config: str | None, around: Path, notes: list[str]) -> nn.Module:
    """The autoencoder of a run folder, of a file or of an autoencoder's YAML, without its weights.

    around: the YAML that is planned; one near it may describe a run that is not there yet.
    """
    if config is not None:
        return _of_yaml(Path(config))
    path = Path(source)
    if not path.exists() and (planned := _config_of_run(path.name, around)) is not None:
        notes.append(f"first_stage {source} does not exist yet; it is planned as {planned} describes it")
        path = planned
    if path.suffix in (".yaml", ".yml"):
        return _of_yaml(path)
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


def _of_yaml(path: Path) -> nn.Module:
    from ldm.training.run_config import load_run

    if path.is_file() and not is_run_config(path):
        model = build_empty(translate(read_original(path)))
        return getattr(model, "first_stage_model", model)
    cfg, keys = load_run(path, assumed=assumed_values(None))
    if keys.task != "autoencoder":
        raise ValueError(f"first_stage {path} is the config of a {keys.task} run, not of an autoencoder")
    return configuration.instantiate(cfg.model, allow_foreign=True)


def assumed_values(size: int | None) -> dict[str, Any]:
    """What a config may leave open."""
    return {"first_stage": None, "data.params.root": ".", "data.params.size": size or SIZE}


def _config_of_run(name: str, around: Path) -> Path | None:
    """The YAML whose run will have this name."""
    for path in sorted(around.resolve().parent.parent.glob("*/*.yaml")):
        if re.search(rf"^name:\s*{re.escape(name)}\s*$", path.read_text(encoding="utf-8"), re.MULTILINE):
            return Path(os.path.relpath(path))
    return None
