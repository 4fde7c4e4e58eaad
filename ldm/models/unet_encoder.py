"""The encoder half of the diffusion UNet, which the noise predictor and classifiers share.

See `ldm.models.unet` for the sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldm.models.network_inputs import check_inputs
from ldm.nn.attention import ATTENTION_BUILDERS, AttentionBlock, make_attn
from ldm.nn.init import conv_nd
from ldm.nn.resblock import DownsampleND, TimestepResBlock, UpsampleND
from ldm.nn.sequence_attention import check_divides
from ldm.nn.timestep import Timestep, TimestepEmbedSequential, embedding_mlp, timestep_embedding
from ldm.nn.transformer import SpatialTransformer
from ldm.wording import check_choice


@dataclass(frozen=True, kw_only=True)
class UNetBlocks:
    """What the blocks of one UNet have in common, by the arguments of `ldm.models.unet.UNetModel`, and how
    each kind is made; `emb_channels` is the length of the time embedding.
    """

    emb_channels: int
    dims: int = 2
    dropout: float = 0.0
    conv_resample: bool = True
    resblock_updown: bool = False
    use_scale_shift_norm: bool = False
    use_checkpoint: bool = False
    num_groups: int = 32
    num_heads: int = -1
    num_head_channels: int = -1
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    context_dim: int | Sequence[int] | None = None
    use_linear_in_transformer: bool = False
    legacy: bool = True
    attn_type: str = "attention"
    attn_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice("UNet: attn_type", self.attn_type, ("attention", *ATTENTION_BUILDERS))
        if self.attn_type != "attention":
            if self.use_spatial_transformer:
                raise ValueError(
                    f"UNet: attn_type={self.attn_type!r} takes the place of the SpatialTransformers, which "
                    "use_spatial_transformer or context_dim asks for"
                )
            if self.dims != 2:
                raise ValueError(f"UNet: attn_type={self.attn_type!r} is for dims=2, not dims={self.dims}")
        elif self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("UNet: give num_heads or num_head_channels; both are -1")
        elif self.attn_options:
            raise ValueError('UNet: attn_options has no effect on attn_type="attention"')
        if self.context_dim is not None and not self.use_spatial_transformer:
            raise ValueError(f"UNet: context_dim={self.context_dim} needs use_spatial_transformer=True")

    def res(self, channels: int, out_channels: int, **resampling: bool) -> TimestepResBlock:
        return TimestepResBlock(
            channels,
            self.emb_channels,
            dropout=self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            num_groups=self.num_groups,
            **resampling,
        )

    def down(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res(channels, channels, down=True)
        return DownsampleND(channels, self.conv_resample, self.dims)

    def up(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res(channels, channels, up=True)
        return UpsampleND(channels, self.conv_resample, self.dims)

    def attention(
        self, channels: int, depth: int, disable_self_attn: bool = False, num_heads: int | None = None
    ) -> nn.Module:
        """A SpatialTransformer of `depth` blocks, an AttentionBlock (`num_heads` is only for it), or what
        `attn_type` names."""
        if self.attn_type != "attention":
            return make_attn(channels, self.attn_type, self.num_groups, self.attn_options)
        if not self.use_spatial_transformer:
            return AttentionBlock(
                channels,
                num_heads=self.num_heads if num_heads is None else num_heads,
                num_head_channels=self.num_head_channels,
                use_checkpoint=self.use_checkpoint,
                use_new_attention_order=self.use_new_attention_order,
                num_groups=self.num_groups,
            )
        heads, dim_head = self._transformer_heads(channels)
        return SpatialTransformer(
            channels,
            heads,
            dim_head,
            depth=depth,
            context_dim=self.context_dim,
            disable_self_attn=disable_self_attn,
            use_linear=self.use_linear_in_transformer,
            use_checkpoint=self.use_checkpoint,
            dims=self.dims,
            num_groups=self.num_groups,
        )

    def _transformer_heads(self, channels: int) -> tuple[int, int]:
        """Number of heads and channels of each, at this width."""
        if self.num_head_channels == -1:
            check_divides("UNet: num_heads", self.num_heads, channels)
            return self.num_heads, channels // self.num_heads
        if not 1 <= self.num_head_channels <= channels:
            raise ValueError(f"UNet: num_head_channels={self.num_head_channels} must be from 1 to {channels}")
        # `legacy` only matters where the division leaves a remainder: it then spreads over the heads.
        heads = channels // self.num_head_channels
        return heads, channels // heads if self.legacy else self.num_head_channels


class UNetEncoder(nn.Module):
    """The half of the UNet that classifiers share: embeddings, `input_blocks` and `middle_block`.

    Args are those of `UNetModel`, those of all blocks as keywords (see `UNetBlocks`).

    Attributes:
        channels: of the middle block's output.
        skip_channels: of each input block's output, in order.
        num_res_blocks: one number per level; likewise `depths` and `disable_self_attentions`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float],
        num_classes: int | str | None = None,
        adm_in_channels: int | None = None,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        disable_middle_transformer: bool = False,
        **common,
    ) -> None:
        super().__init__()
        emb_channels = 4 * model_channels
        self.parts = blocks = UNetBlocks(emb_channels=emb_channels, **common)
        levels = len(channel_mult)
        if not levels:
            raise ValueError("UNet: channel_mult is empty; give a width for at least one level")
        self.in_channels, self.model_channels = in_channels, model_channels
        self.num_classes, self.adm_in_channels = num_classes, adm_in_channels
        self.dims, self.context_dim = blocks.dims, blocks.context_dim
        self.downsampling_factor = 2 ** (levels - 1)
        self.attention_resolutions = tuple(attention_resolutions)
        self.widths = [int(mult * model_channels) for mult in channel_mult]
        self.num_res_blocks = _per_level("num_res_blocks", num_res_blocks, levels)
        self.depths = _per_level("transformer_depth", transformer_depth, levels)
        disabled = False if disable_self_attentions is None else disable_self_attentions
        self.disable_self_attentions = _per_level("disable_self_attentions", disabled, levels)
        if blocks.context_dim is None and (any(self.disable_self_attentions) or disable_middle_self_attn):
            raise ValueError("UNet: self-attention can only be disabled with a context_dim")
        self.num_attention_blocks = None
        if num_attention_blocks is not None:
            self.num_attention_blocks = _per_level("num_attention_blocks", list(num_attention_blocks), levels)
            if any(a > r for a, r in zip(self.num_attention_blocks, self.num_res_blocks, strict=True)):
                given = f"num_attention_blocks={self.num_attention_blocks}"
                raise ValueError(f"UNet: {given} exceeds num_res_blocks={self.num_res_blocks}")
        if adm_in_channels is not None and num_classes != "sequential":
            raise ValueError(f'UNet: adm_in_channels={adm_in_channels} needs num_classes="sequential"')
        self.time_embed = embedding_mlp(model_channels, emb_channels)
        if num_classes is not None:
            self.label_emb = _label_embedding(num_classes, model_channels, emb_channels, adm_in_channels)

        channels = self.widths[0]
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(blocks.dims, in_channels, channels, 3, padding=1))]
        )
        self.skip_channels = [channels]
        for level, width in enumerate(self.widths):
            for index in range(self.num_res_blocks[level]):
                layers: list[nn.Module] = [blocks.res(channels, width)]
                channels = width
                layers += self._attention(level, index)
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self.skip_channels.append(channels)
            if level != levels - 1:
                self.input_blocks.append(TimestepEmbedSequential(blocks.down(channels)))
                self.skip_channels.append(channels)
        self.channels = channels

        depth = self.depths[-1] if transformer_depth_middle is None else transformer_depth_middle
        first, middle = blocks.res(channels, channels), nn.Identity()
        if not disable_middle_transformer:
            middle = blocks.attention(channels, depth, disable_middle_self_attn)
        self.middle_block = TimestepEmbedSequential(first, middle, blocks.res(channels, channels))

    def _attention(self, level: int, index: int, num_heads: int | None = None) -> list[nn.Module]:
        """The attention after the residual block `index` of `level`: a list of one, or of none."""
        if 2**level not in self.attention_resolutions:
            return []
        if self.num_attention_blocks is not None and index >= self.num_attention_blocks[level]:
            return []
        disable_self_attn = self.disable_self_attentions[level]
        return [self.parts.attention(self.widths[level], self.depths[level], disable_self_attn, num_heads)]

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """timesteps (B,), y as `UNetModel.forward` takes it -> (B, 4 model_channels)."""
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        if self.num_classes is None:
            return emb
        if self.num_classes == "timestep":
            features, mlp = self.label_emb
            return emb + mlp(features(y).to(dtype))
        if self.num_classes == "continuous":
            y = y.reshape(-1, 1)
        return emb + self.label_emb(y if isinstance(self.num_classes, int) else y.to(dtype))

    def encode(
        self, x: Tensor, emb: Tensor, context: Tensor | Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The middle block's output, and the output of each input block."""
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        return self.middle_block(x, emb, context), skips

    def check_inputs(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> None:
        """Raise a ValueError that says what is wrong with the shapes."""
        if x.ndim != 2 + self.dims or x.shape[1] != self.in_channels:
            expected = ", ".join(["B", str(self.in_channels), *"DHW"[-self.dims :]])
            raise ValueError(f"UNet: x has shape {tuple(x.shape)}, expected ({expected})")
        if any(size % self.downsampling_factor for size in x.shape[2:][-2:]):
            raise ValueError(
                f"UNet: {tuple(x.shape[2:])} pixels are no multiple of {self.downsampling_factor}"
            )
        check_inputs(self, len(x), timesteps, context, y)


def _per_level(name: str, value: int | Sequence, levels: int) -> list:
    """One entry for each level, from one for all or from a list."""
    if isinstance(value, int):
        return [value] * levels
    entries = list(value)
    if len(entries) != levels:
        raise ValueError(f"UNet: {name}={entries} has {len(entries)} entries for {levels} levels")
    return entries


def _label_embedding(
    num_classes: int | str, model_channels: int, emb_channels: int, adm_in_channels: int | None
) -> nn.Module:
    """The layer that `y` goes through; see `ldm.models.unet.UNetModel` for the kinds."""
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, emb_channels)
    check_choice("UNet: num_classes", num_classes, ("continuous", "timestep", "sequential"))
    if num_classes == "continuous":
        return nn.Linear(1, emb_channels)
    if num_classes == "timestep":
        return nn.Sequential(Timestep(model_channels), embedding_mlp(model_channels, emb_channels))
    if adm_in_channels is None:
        raise ValueError('UNet: num_classes="sequential" needs adm_in_channels, the length of y')
    return nn.Sequential(embedding_mlp(adm_in_channels, emb_channels))
