"""The convolutional encoder and decoder of the first stages, as of taming transformers (Esser et al. 2020,
arXiv:2012.09841), with the parameter names of the published latent diffusion checkpoints.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.arguments import arguments_of, remembers_arguments
from ldm.nn.attention import make_attn
from ldm.nn.resblock import Downsample, ResBlock, Upsample, normalize
from ldm.wording import did_you_mean


@dataclass(frozen=True)
class _Options:
    """Builders of the parts that all levels share."""

    dropout: float
    attn_type: str
    attn_options: Mapping[str, Any] | None
    num_groups: int

    def block(self, in_channels: int, out_channels: int) -> ResBlock:
        return ResBlock(in_channels, out_channels, dropout=self.dropout, num_groups=self.num_groups)

    def attention(self, channels: int) -> nn.Module:
        return make_attn(channels, self.attn_type, self.num_groups, self.attn_options)


class Level(nn.Module):
    """One resolution: `block` and, where it attends, as many `attn`; names as published."""

    def __init__(self, in_channels: int, channels: int, blocks: int, attends: bool, options: _Options):
        super().__init__()
        self.block = nn.ModuleList(
            options.block(in_channels if i == 0 else channels, channels) for i in range(blocks)
        )
        self.attn = nn.ModuleList(options.attention(channels) for _ in range(blocks if attends else 0))

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, options: _Options):
        super().__init__()
        self.block_1 = options.block(channels, channels)
        self.attn_1 = options.attention(channels)
        self.block_2 = options.block(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


@remembers_arguments
class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> (B, z_channels, H / f, W / f), twice the channels with `double_z`.

    f = 2^(len(ch_mult) - 1). `ch` times `ch_mult[i]` channels and `num_res_blocks` blocks at level i;
    attention at the levels whose size is in `attn_resolutions` (pixels, for images of `resolution`; the
    network itself takes any size that f divides, square or not) and between the middle's two blocks.
    `attn_type` and `attn_options` as in `ldm.nn.attention.make_attn`: vanilla, linear, se, cbam, eca or none;
    `use_linear_attn` is the older way to say linear. `num_groups` of the GroupNorms. Takes a whole
    `ddconfig`: `out_ch`, `give_pre_end` and `tanh_out` concern the decoder alone.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        in_channels: int,
        resolution: int,
        z_channels: int,
        attn_resolutions: tuple[int, ...] = (),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        attn_options: Mapping[str, Any] | None = None,
        num_groups: int = 32,
        out_ch: int | None = None,
        give_pre_end: bool = False,
        tanh_out: bool = False,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        options = _Options(dropout, attn_type, attn_options, num_groups)
        sizes = _level_sizes(resolution, ch_mult, attn_resolutions)
        self.in_channels, self.factor = in_channels, 2 ** (len(ch_mult) - 1)
        self.attn_options = dict(attn_options or {})
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for i, (mult, size) in enumerate(zip(ch_mult, sizes, strict=True)):
            level = Level(channels, ch * mult, num_res_blocks, size in attn_resolutions, options)
            channels = ch * mult
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(channels, resamp_with_conv)
            self.down.append(level)
        self.mid = Middle(channels, options)
        self.norm_out = normalize(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """ValueError when the channels are others or f does not divide H and W."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"the encoder takes images (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"sizes must be multiples of {self.factor}, got {x.shape[2]}x{x.shape[3]}")
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


@remembers_arguments
class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) -> images (B, out_ch, f * h, f * w); arguments as for `Encoder`.

    `num_res_blocks` + 1 blocks a level. `give_pre_end` returns the features before the last norm and
    convolution; `tanh_out` bounds the image to (-1, 1).
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        resolution: int,
        z_channels: int,
        attn_resolutions: tuple[int, ...] = (),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        attn_options: Mapping[str, Any] | None = None,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        num_groups: int = 32,
        in_channels: int | None = None,
        double_z: bool = True,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        options = _Options(dropout, attn_type, attn_options, num_groups)
        sizes = _level_sizes(resolution, ch_mult, attn_resolutions)
        self.z_channels, self.give_pre_end, self.tanh_out = z_channels, give_pre_end, tanh_out
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, options)
        levels: list[Level] = []
        for i in reversed(range(len(ch_mult))):
            level = Level(
                channels, ch * ch_mult[i], num_res_blocks + 1, sizes[i] in attn_resolutions, options
            )
            channels = ch * ch_mult[i]
            if i > 0:
                level.upsample = Upsample(channels, resamp_with_conv)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the highest resolution
        self.norm_out = normalize(channels, num_groups)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The last convolution's kernel, where the adaptive weight of the adversarial loss is measured."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != self.z_channels:
            raise ValueError(f"the decoder takes latents (B, {self.z_channels}, h, w), got {tuple(z.shape)}")
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        x = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(x) if self.tanh_out else x


def _level_sizes(resolution: int, ch_mult, attn_resolutions) -> list[int]:
    """The size in pixels at each level; ValueError when an attention resolution is not among them."""
    if len(ch_mult) == 0:
        raise ValueError("ch_mult must name at least one level")
    sizes = [resolution // 2**i for i in range(len(ch_mult))]
    unreached = [size for size in attn_resolutions if size not in sizes]
    if unreached:
        raise ValueError(f"attn_resolutions {unreached}: at resolution {resolution} the levels have {sizes}")
    return sizes


def check_ddconfig(ddconfig: dict) -> None:
    """ValueError with the nearest right name for an unknown key, and with the list of missing keys."""
    halves = [inspect.signature(half).parameters for half in (Decoder, Encoder)]
    known = sorted({name for half in halves for name in half})
    for key in ddconfig:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ValueError(f"ddconfig.{key} is not known; there are {', '.join(known)}{hint}")
    required = {name for half in halves for name, p in half.items() if p.default is p.empty}
    missing = sorted(required - set(ddconfig))
    if missing:
        raise ValueError(f"ddconfig lacks {', '.join(missing)}")


def ddconfig_of(encoder: Encoder, decoder: Decoder) -> dict[str, Any]:
    """The `ddconfig` of both, with every key, kinds of attention by today's names; ValueError where the
    decoder is no mirror image of the encoder."""
    ours, theirs = ({**arguments_of(half), "use_linear_attn": False} for half in (encoder, decoder))
    for arguments, half in ((ours, encoder), (theirs, decoder)):
        if arguments_of(half)["use_linear_attn"]:
            arguments["attn_type"] = "linear"
    shared = ("ch", "ch_mult", "num_res_blocks", "attn_type", "num_groups", "resamp_with_conv")
    alike = all(_plain(ours[name]) == _plain(theirs[name]) for name in shared)
    levels = [[len(level.attn) > 0 for level in half] for half in (encoder.down, decoder.up)]
    if not alike or levels[0] != levels[1]:
        raise ValueError("its decoder is no mirror image of its encoder")
    of_decoder = {name: theirs[name] for name in ("out_ch", "give_pre_end", "tanh_out")}
    merged = {name: _plain(value) for name, value in {**ours, **of_decoder}.items()}
    del merged["use_linear_attn"]
    return merged


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
