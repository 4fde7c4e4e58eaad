"""The classifier and the super-resolution network of OpenAI's guided-diffusion.

Dhariwal & Nichol 2021 (https://arxiv.org/abs/2105.05233, section 4 and appendix H) for the classifier, Nichol
& Dhariwal 2021 (https://arxiv.org/abs/2102.09672) for super-resolution. Arguments and parameter names are
those of the repository, so that a published state dict loads strictly.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.models.unet import UNetModel
from ldm.models.unet_encoder import UNetEncoder
from ldm.nn.attention import QKVAttention
from ldm.nn.init import zero_module
from ldm.nn.resblock import normalize
from ldm.nn.sequence_attention import check_divides
from ldm.wording import check_choice

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
_HIDDEN = 2048  # of the two-layer heads over the features of all levels


def _normed(channels: int, num_groups: int) -> list[nn.Module]:
    return [normalize(channels, num_groups, eps=1e-5), nn.SiLU()]


class AttentionPool(nn.Module):
    """One vector from a feature map of so many `positions` (height times width) and `channels`: the mean
    attends to all of them (as in CLIP, Radford et al. 2021)."""

    def __init__(self, positions: int, channels: int, head_channels: int, out_channels: int) -> None:
        super().__init__()
        check_divides("AttentionPool: num_head_channels", head_channels, channels)
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(channels // head_channels, new_order=True)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels); ValueError for another number of positions."""
        x = x.flatten(2)  # (B, C, T)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # the mean first: (B, C, T + 1)
        given, expected = x.shape[-1] - 1, self.positional_embedding.shape[1] - 1
        if given != expected:
            raise ValueError(f"AttentionPool: {given} positions given, but image_size has {expected}")
        x = self.attention(self.qkv_proj(x + self.positional_embedding))
        return self.c_proj(x)[:, :, 0]


@remembers_arguments
class EncoderUNetModel(UNetEncoder):
    """The downsampling half of the UNet as a classifier of noisy images.

    Args:
        image_size: side of the images in pixels; `pool="attention"` takes this size only, others any.
        in_channels: of the images.
        out_channels: number of classes.
        pool: "adaptive", the mean over positions; "attention", `AttentionPool`; "spatial" and "spatial_v2",
            two layers over the means of every block's output (the second with a GroupNorm and SiLU).
        num_head_channels: as in `UNetModel`; `pool="attention"` needs it.
        others: see `UNetModel`.

    Raises:
        ValueError: unknown pool, or arguments that contradict each other.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
        num_groups: int = 32,
        use_fp16: bool = False,
    ) -> None:
        check_choice("EncoderUNetModel: pool", pool, POOLS)
        if pool == "attention" and num_head_channels == -1:
            raise ValueError('EncoderUNetModel: pool="attention" needs num_head_channels')
        super().__init__(
            in_channels=in_channels,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            channel_mult=channel_mult,
            dropout=dropout,
            conv_resample=conv_resample,
            resblock_updown=resblock_updown,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
            num_groups=num_groups,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
        )
        self.pool, self.out_channels = pool, out_channels
        channels = self.channels
        if pool == "adaptive":
            head = [zero_module(nn.Conv2d(channels, out_channels, 1)), nn.Flatten()]
            layers = [*_normed(channels, num_groups), nn.AdaptiveAvgPool2d((1, 1)), *head]
        elif pool == "attention":
            positions = (image_size // self.downsampling_factor) ** 2
            head = AttentionPool(positions, channels, num_head_channels, out_channels)
            layers = [*_normed(channels, num_groups), head]
        else:
            first = nn.Linear(sum(self.skip_channels) + channels, _HIDDEN)
            between = [nn.ReLU()] if pool == "spatial" else _normed(_HIDDEN, num_groups)
            layers = [first, *between, nn.Linear(_HIDDEN, out_channels)]
        self.out = nn.Sequential(*layers)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy images (B, in_channels, H, W) at times (B,) -> logits (B, out_channels), else ValueError."""
        self.check_inputs(x, timesteps)
        h, skips = self.encode(x, self.embed(timesteps))
        if self.pool.startswith("spatial"):
            h = torch.cat([level.mean(dim=(2, 3)) for level in (*skips, h)], dim=1)  # (B, features)
        return self.out(h)


@remembers_arguments
class SuperResModel(UNetModel):
    """A UNet that sees, beside the noisy image, a low-resolution one.

    Args:
        in_channels: of the images; the first convolution takes twice as many.
        others: see `UNetModel`.
    """

    def __init__(self, *, in_channels: int, **arguments) -> None:
        super().__init__(in_channels=2 * in_channels, **arguments)

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor, y: Tensor | None = None) -> Tensor:
        """The raw prediction at x (B, C, H, W), given `low_res` (B, C, h, w), upsampled bilinearly."""
        low_res = F.interpolate(low_res, x.shape[-2:], mode="bilinear")
        return super().forward(torch.cat([x, low_res], dim=1), timesteps, y=y)
