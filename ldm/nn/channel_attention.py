"""Attention over channels and over the places of a feature map: squeeze-and-excitation, CBAM, ECA.

They weigh what is there instead of mixing positions, for a small fraction of self-attention's cost, and keep
the shape, so that each can stand where an `AttnBlock` stands. All weights lie in (0, 1).
"""

import math

import torch
from torch import Tensor, nn

from ldm.wording import check_choice


def _reduced(channels: int, reduction: int) -> int:
    """Width of a bottleneck, at least 1."""
    if not 1 <= reduction <= channels:
        raise ValueError(f"reduction={reduction} of {channels} channels must be from 1 to {channels}")
    return channels // reduction


class SqueezeExcitation(nn.Module):
    """x * sigmoid(W2 relu(W1 mean(x))), one weight a channel (Hu et al. 2017, https://arxiv.org/abs/1709.01507,
    eqs. 2-4), the bottleneck `channels // reduction` wide; ValueError where that is 0.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = _reduced(channels, reduction)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


class ChannelAttention(nn.Module):
    """CBAM's weights of the channels: sigmoid(mlp(mean(x)) + mlp(max(x))), the mlp shared (Woo et al. 2018,
    https://arxiv.org/abs/1807.06521, eq. 2), its bottleneck as in `SqueezeExcitation`.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = _reduced(channels, reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1), the weights alone."""
        pooled = (x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True))
        return torch.sigmoid(sum(self.fc2(self.fc1(p).relu()) for p in pooled))


class SpatialAttention(nn.Module):
    """CBAM's weights of the places: sigmoid(conv([mean(x), max(x)])), both over the channels (Woo et al.
    2018, https://arxiv.org/abs/1807.06521, eq. 3). ValueError for an even kernel, which would shift the map.
    """

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"SpatialAttention: kernel_size={kernel_size} is not a positive odd number")
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W), the weights alone."""
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)  # (B, 2, H, W)
        return torch.sigmoid(self.conv1(pooled))


class CBAM(nn.Module):
    """Channel attention, then spatial attention on its result (Woo et al. 2018,
    https://arxiv.org/abs/1807.06521, eq. 1), or one of the two alone, by `parts`: "both", "channel" or
    "spatial". `reduction` is the channel attention's, `kernel_size` the spatial one's.
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7, parts: str = "both") -> None:
        super().__init__()
        check_choice("CBAM: parts", parts, ("both", "channel", "spatial"))
        self.channelattention = ChannelAttention(channels, reduction) if parts != "spatial" else None
        self.spatialattention = SpatialAttention(kernel_size) if parts != "channel" else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.channelattention is not None:
            x = x * self.channelattention(x)
        if self.spatialattention is not None:
            x = x * self.spatialattention(x)
        return x


def eca_kernel_size(channels: int, gamma: float = 2.0, b: float = 1.0) -> int:
    """The odd number that |log2(channels) / gamma + b / gamma| is cut to, or the next odd one above (Wang et
    al. 2019, https://arxiv.org/abs/1910.03151, eq. 12, cut first as in its code). ValueError for gamma 0.
    """
    if channels < 1 or gamma == 0:
        raise ValueError(f"eca_kernel_size: channels={channels} must be at least 1 and gamma={gamma} not 0")
    size = int(abs((math.log2(channels) + b) / gamma))
    return size if size % 2 else size + 1


class EfficientChannelAttention(nn.Module):
    """x * sigmoid(conv1d(mean(x))): each channel's weight from its neighbours' means alone (Wang et al. 2019,
    https://arxiv.org/abs/1910.03151, section 3.3), the kernel by `eca_kernel_size`.
    """

    def __init__(self, channels: int, gamma: float = 2.0, b: float = 1.0) -> None:
        super().__init__()
        kernel_size = eca_kernel_size(channels, gamma, b)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        weights = self.conv(x.mean(dim=(2, 3))[:, None])  # (B, 1, C), the channels as a sequence
        return x * weights.sigmoid()[:, 0, :, None, None]
