"""Residual blocks and changes of resolution, of the autoencoder and of the diffusion UNet.

The autoencoder's (`ResBlock`, `Upsample`, `Downsample`) follow Rombach et al. 2021
(https://arxiv.org/abs/2112.10752) and taming-transformers; the UNet's (`TimestepResBlock`, `UpsampleND`,
`DownsampleND`) Dhariwal & Nichol 2021 (https://arxiv.org/abs/2105.05233, table 1 and section 3) and
improved-diffusion. Parameter names are those of the original repositories.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.checkpoint import checkpoint
from ldm.nn.init import avg_pool_nd, conv_nd, zero_module
from ldm.nn.timestep import TimestepBlock


def normalize(channels: int, num_groups: int = 32, eps: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm over (B, channels, ...); ValueError with the numbers that do, if `num_groups` divides not."""
    if num_groups < 1 or channels % num_groups:
        good = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        raise ValueError(f"num_groups={num_groups} does not divide {channels} channels; allowed: {good}")
    return nn.GroupNorm(num_groups, channels, eps=eps)


class Upsample(nn.Module):
    """Nearest-neighbour doubling of (B, C, H, W), then an optional 3x3 convolution (`conv`)."""

    def __init__(self, in_channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Halving of (B, C, H, W): a 3x3 convolution of stride 2 (`conv`), or 2x2 averages.

    The convolution pads on the right and at the bottom only, as taming-transformers does.
    """

    def __init__(self, in_channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H // 2, W // 2)."""
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, kernel_size=2, stride=2)


class ResBlock(nn.Module):
    """The autoencoder's residual block: (GroupNorm, SiLU, 3x3 convolution) twice, plus the input.

    Where the number of channels changes, the input passes a 1x1 convolution (`nin_shortcut`), or a 3x3 one
    (`conv_shortcut`) on request.

    Args:
        in_channels, out_channels: of input and output; None keeps `in_channels`.
        conv_shortcut: 3x3 instead of 1x1 on the shortcut.
        dropout: probability of a zero before the second convolution.
        temb_channels: length of an embedding to be added between the convolutions; 0 for none.
        num_groups: of the GroupNorms; must divide both numbers of channels (ValueError).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self._shortcut: str | None = None
        if in_channels != out_channels:
            self._shortcut, size = ("conv_shortcut", 3) if conv_shortcut else ("nin_shortcut", 1)
            self.add_module(self._shortcut, nn.Conv2d(in_channels, out_channels, size, padding=size // 2))
        self.temb_channels = temb_channels

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), temb (B, temb_channels) exactly where the block takes one -> (B, C', H, W)."""
        if (temb is None) == bool(self.temb_channels):
            given = "missing" if temb is None else f"given with shape {tuple(temb.shape)}"
            raise ValueError(f"ResBlock(temb_channels={self.temb_channels}): temb is {given}")
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self._shortcut is not None:
            x = getattr(self, self._shortcut)(x)
        return x + h


class UpsampleND(nn.Module):
    """The UNet's nearest-neighbour doubling over 1, 2 or 3 dimensions, then an optional convolution (`conv`).

    In three dimensions the first one (time or depth) keeps its length.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = _check_resampling(channels, out_channels, use_conv)
        self.scale = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, out_channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W), and likewise in 1 dimension; in 3, (D, H, W) -> (D, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=self.scale, mode="nearest"))


class DownsampleND(nn.Module):
    """The UNet's halving over 1, 2 or 3 dimensions: a convolution of stride 2, or averages (`op`).

    In three dimensions the first one (time or depth) keeps its length.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = _check_resampling(channels, out_channels, use_conv)
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2), and likewise in 1 dimension; in 3, D stays."""
        return self.op(x)


def _check_resampling(channels: int, out_channels: int | None, use_conv: bool) -> int:
    if out_channels is None:
        return channels
    if out_channels != channels and not use_conv:
        raise ValueError(f"{channels} -> {out_channels} channels needs use_conv=True")
    return out_channels


class TimestepResBlock(TimestepBlock):
    """The UNet's residual block, told the time: improved-diffusion's `ResBlock`.

    in_layers (norm, SiLU, conv), the time embedding, out_layers (norm, SiLU, dropout, zero-initialised
    conv), plus the input through `skip_connection`. The embedding is added, or scales and shifts the second
    norm (adaptive group normalisation: norm(h) (1 + scale) + shift).

    Args:
        channels, out_channels: of input and output; None keeps `channels`.
        emb_channels: length of the time embedding.
        dropout: probability of a zero before the last convolution.
        use_conv: 3x3 instead of 1x1 on a skip connection that changes the number of channels.
        use_scale_shift_norm: scale and shift instead of adding.
        dims: spatial dimensions, 1, 2 or 3.
        use_checkpoint: recompute this block in the backward pass.
        up, down: double or halve the resolution between the first norm and the first convolution (not both).
        num_groups: of the GroupNorms; must divide both numbers of channels (ValueError).
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        if up and down:
            raise ValueError("TimestepResBlock: up and down exclude each other, both are True")
        out_channels = channels if out_channels is None else out_channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint

        self.in_layers = nn.Sequential(
            normalize(channels, num_groups, eps=1e-5),
            nn.SiLU(),
            conv_nd(dims, channels, out_channels, 3, padding=1),
        )
        self.h_upd, self.x_upd = _resample(channels, dims, up, down), _resample(channels, dims, up, down)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalize(out_channels, num_groups, eps=1e-5),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            size = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, out_channels, size, padding=size // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, *spatial), emb (B, emb_channels) -> (B, C', *spatial')."""
        return checkpoint(self._forward, (x, emb), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        in_norm, in_act, in_conv = self.in_layers
        h = in_conv(self.h_upd(in_act(in_norm(x))))
        x = self.x_upd(x)

        emb = self.emb_layers(emb).to(h.dtype)
        emb = emb.reshape(*emb.shape, *(1,) * (h.ndim - 2))  # (B, C' or 2C', 1, ...)
        out_norm, *out_rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
        else:
            h = out_norm(h + emb)
        for layer in out_rest:
            h = layer(h)
        return self.skip_connection(x) + h


def _resample(channels: int, dims: int, up: bool, down: bool) -> nn.Module:
    if up:
        return UpsampleND(channels, use_conv=False, dims=dims)
    if down:
        return DownsampleND(channels, use_conv=False, dims=dims)
    return nn.Identity()
