"""LPIPS: the learned perceptual distance of Zhang et al. 2018 (arXiv:1801.03924) over VGG16 features."""

import os

import torch
from torch import Tensor, nn

from ldm.losses.perceptual import FrozenNetwork, as_rgb, check_pair, unit_length
from ldm.losses.pretrained import LPIPS_HEADS, VGG16, load_published
from ldm.weights.fetching import find_weights

CHANNELS = (64, 128, 256, 512, 512)
# (stage, index in torchvision's vgg16().features, output channels) of every convolution
_CONVOLUTIONS = (
    (1, 0, 64), (1, 2, 64),
    (2, 5, 128), (2, 7, 128),
    (3, 10, 256), (3, 12, 256), (3, 14, 256),
    (4, 17, 512), (4, 19, 512), (4, 21, 512),
    (5, 24, 512), (5, 26, 512), (5, 28, 512),
)  # fmt: skip
# What torchvision's published file holds beyond the feature network: the classifier's three linear layers.
_UNUSED = frozenset(f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias"))
SMALLEST = 16  # four poolings must leave a pixel


class VGG16Features(nn.Module):
    """The five convolution stages of VGG16 (Simonyan and Zisserman 2014), each read after its last ReLU.

    Layers carry their index in torchvision's `features` inside `slice1` ... `slice5`, the naming of the LPIPS
    checkpoints. `forward`: (B, 3, H, W) -> five maps (B, C_k, H / 2^k, W / 2^k), C = 64, 128, 256, 512, 512.
    """

    def __init__(self):
        super().__init__()
        channels = 3
        for stage in range(1, 6):
            layers = nn.Sequential()
            for _, index, width in (entry for entry in _CONVOLUTIONS if entry[0] == stage):
                if not len(layers) and stage > 1:
                    layers.add_module(str(index - 1), nn.MaxPool2d(kernel_size=2, stride=2))
                layers.add_module(str(index), nn.Conv2d(channels, width, kernel_size=3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU(inplace=True))
                channels = width
            self.add_module(f"slice{stage}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in (self.slice1, self.slice2, self.slice3, self.slice4, self.slice5):
            x = stage(x)
            maps.append(x)
        return maps


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's VGG16 names (`features.0.weight`) -> those of `VGG16Features` (`slice1.0.weight`); of the
    rest the classifier's are dropped and others kept, so that strict loading reports them.
    """
    names = {
        f"features.{index}.{kind}": f"slice{stage}.{index}.{kind}"
        for stage, index, _ in _CONVOLUTIONS
        for kind in ("weight", "bias")
    }
    return {names.get(name, name): value for name, value in state.items() if name not in _UNUSED}


class ScalingLayer(nn.Module):
    """[-1, 1] RGB -> the ImageNet normalisation that VGG16 was trained with."""

    def __init__(self):
        super().__init__()
        # mean (.485, .456, .406) and std (.229, .224, .225) of [0, 1] images, moved to [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class LinearHead(nn.Module):
    """Non-negative weights over the channels of one stage; index 1 in `model` as in the published files.

    (B, C, H, W) -> (B, 1, 1, 1): the mean over positions is taken before the linear map, which gives the same
    number for less work and keeps it in float32 under autocast. The dropout of the published heads acts in
    their own training alone.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, kernel_size=1, bias=False))

    def forward(self, difference: Tensor) -> Tensor:
        weight = self.model[1].weight[0]  # (C, 1, 1)
        return (difference.mean(dim=(2, 3), keepdim=True) * weight).sum(dim=1, keepdim=True)


class LPIPS(FrozenNetwork):
    """d(x, y) = sum over stages of mean over positions of w_k . (f_k(x) - f_k(y))^2 with unit-length features
    (eq. 1).

    `pretrained=False` leaves the weights random, for a caller that loads a state dict. `vgg_path` and
    `lpips_path` are local copies of the published files (see `ldm.weights.fetching` for where they are
    looked for otherwise). Frozen; gradients reach both inputs.
    """

    def __init__(
        self,
        vgg_path: str | os.PathLike | None = None,
        lpips_path: str | os.PathLike | None = None,
        pretrained: bool = True,
    ):
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, channels in enumerate(CHANNELS):
            self.add_module(f"lin{i}", LinearHead(channels))
        if pretrained:
            # The small file first: fail before 528 MB are fetched.
            heads = nn.ModuleDict({f"lin{i}": self.get_submodule(f"lin{i}") for i in range(len(CHANNELS))})
            load_published(heads, find_weights(LPIPS_HEADS, lpips_path))
            load_published(self.net, find_weights(VGG16, vgg_path), from_torchvision)
        self.freeze()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1], H and W at least 16 -> distances (B, 1, 1, 1), float32."""
        check_pair(x, y)
        if min(x.shape[-2:]) < SMALLEST:
            raise ValueError(f"LPIPS takes images of at least {SMALLEST}x{SMALLEST}, got {tuple(x.shape)}")
        maps_x = self.net(self.scaling_layer(as_rgb(x)))
        maps_y = self.net(self.scaling_layer(as_rgb(y)))
        return sum(
            self.get_submodule(f"lin{i}")((unit_length(fx) - unit_length(fy)).square())
            for i, (fx, fy) in enumerate(zip(maps_x, maps_y, strict=True))
        )
