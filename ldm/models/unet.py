"""The diffusion UNet of latent diffusion, of Stable Diffusion 1, 2 and XL, and of OpenAI's ADM.

Follows Ho et al. 2020 (https://arxiv.org/abs/2006.11239, appendix B), Dhariwal & Nichol 2021
(https://arxiv.org/abs/2105.05233, section 3) and Rombach et al. 2021 (https://arxiv.org/abs/2112.10752,
section 3.3). Arguments and parameter names are those of the repositories guided-diffusion, latent-diffusion
and generative-models (sgm), so that a published state dict loads strictly.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.models.unet_encoder import UNetEncoder
from ldm.nn.init import conv_nd, zero_module
from ldm.nn.resblock import normalize
from ldm.nn.timestep import TimestepEmbedSequential
from ldm.wording import check_choice


@remembers_arguments
class UNetModel(UNetEncoder):
    """The UNet: predicts, from a noisy sample and its time, what the denoiser asks for (noise, v, ...).

    Args:
        in_channels, out_channels: of `x` and of the result.
        model_channels: width that `channel_mult` multiplies.
        num_res_blocks: residual blocks per level, one number or one for each level.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which there is attention; factors that
            no level has are ignored, since published configs list such.
        dropout: in the residual blocks.
        channel_mult: width of each level over `model_channels`; every further level halves the resolution.
        conv_resample: learned down- and upsampling instead of averages and plain repetition.
        dims: spatial dimensions, 1, 2 or 3; with 3 the first one keeps its length at all levels.
        num_classes: how `y` enters, added to the time embedding. An int: class numbers, embedded;
            "continuous": one number, through a linear layer; "timestep": one number, embedded as the time is;
            "sequential": a vector of `adm_in_channels`, through a small network. None: there is no `y`.
        adm_in_channels: length of the vector for "sequential".
        use_checkpoint: recompute each block in the backward pass (less memory, more time).
        num_heads, num_head_channels: number of attention heads, or the channels of each, which goes first.
        num_heads_upsample: another number of heads in the decoder; only for AttentionBlocks.
        use_scale_shift_norm: the embedding scales and shifts the norms instead of being added.
        resblock_updown: residual blocks that change the resolution instead of `conv_resample`.
        use_new_attention_order: layout of AttentionBlock's q, k, v (see `ldm.nn.attention.QKVAttention`).
        use_spatial_transformer: SpatialTransformers instead of AttentionBlocks. None: where `context_dim` is
            given. (sgm's UNet has them always: set True for its configs without a context.)
        transformer_depth: transformer blocks in each SpatialTransformer, one number or one for each level.
        transformer_depth_middle: the same for the middle; None takes the last level's.
        context_dim: channels of the context tokens: a number, or a list with one for each transformer block.
        use_linear_in_transformer: linear layers as the SpatialTransformers' projections (SD 2, SDXL).
        disable_self_attentions: per level, whether the first attention attends to the context too.
        num_attention_blocks: per level, how many of the residual blocks have attention after them.
        disable_middle_self_attn, disable_middle_transformer: the middle's attention attends to the context
            twice; there is none.
        n_embed: predict logits over so many codebook entries (`id_predictor`) instead of `out_channels`.
        legacy: where `num_head_channels` does not divide the width of a SpatialTransformer, True makes its
            heads wider, False leaves channels out.
        spatial_transformer_attn_type: "softmax" or "softmax-xformers", the same function here.
        attn_type: what stands where there is attention, the middle included. "attention": SpatialTransformers
            or AttentionBlocks, as above. Otherwise a name of `ldm.nn.attention.make_attn` (se, cbam, eca,
            linear, vanilla, none), for a network without a context; the heads then have no effect.
        attn_options: of that kind, see `make_attn`: `{reduction: 8}` for se, say.
        num_groups: of all GroupNorms; must divide every width.
        image_size, use_fp16: stand in published configs and have no effect: any size is taken, and the
            precision is the caller's choice (autocast, `.to(dtype)`).

    Raises:
        ValueError: arguments that contradict each other; lists that are not as long as `channel_mult`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        adm_in_channels: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool | None = None,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        context_dim: int | Sequence[int] | None = None,
        use_linear_in_transformer: bool = False,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        disable_middle_transformer: bool = False,
        n_embed: int | None = None,
        legacy: bool = True,
        spatial_transformer_attn_type: str = "softmax",
        attn_type: str = "attention",
        attn_options: Mapping[str, Any] | None = None,
        num_groups: int = 32,
        image_size: int | Sequence[int] | None = None,
        use_fp16: bool = False,
    ) -> None:
        kinds = ("softmax", "softmax-xformers")
        check_choice("UNet: spatial_transformer_attn_type", spatial_transformer_attn_type, kinds)
        if use_spatial_transformer is None:
            use_spatial_transformer = context_dim is not None
        if num_heads_upsample not in (-1, num_heads) and (use_spatial_transformer or not legacy):
            raise ValueError(f"UNet: num_heads_upsample={num_heads_upsample} is for AttentionBlocks alone")
        super().__init__(
            in_channels=in_channels,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            channel_mult=channel_mult,
            num_classes=num_classes,
            adm_in_channels=adm_in_channels,
            transformer_depth=transformer_depth,
            transformer_depth_middle=transformer_depth_middle,
            disable_self_attentions=disable_self_attentions,
            num_attention_blocks=num_attention_blocks,
            disable_middle_self_attn=disable_middle_self_attn,
            disable_middle_transformer=disable_middle_transformer,
            dims=dims,
            dropout=dropout,
            conv_resample=conv_resample,
            resblock_updown=resblock_updown,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
            num_groups=num_groups,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
            use_spatial_transformer=use_spatial_transformer,
            context_dim=context_dim,
            use_linear_in_transformer=use_linear_in_transformer,
            legacy=legacy,
            attn_type=attn_type,
            attn_options=attn_options,
        )
        self.out_channels = out_channels

        heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        channels, skip_channels = self.channels, list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self.widths))):
            last = self.num_res_blocks[level]
            for index in range(last + 1):
                layers: list[nn.Module] = [self.parts.res(channels + skip_channels.pop(), width)]
                channels = width
                layers += self._attention(level, index, heads_upsample)
                if level and index == last:
                    layers.append(self.parts.up(channels))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalize(channels, num_groups, eps=1e-5),
            nn.SiLU(),
            zero_module(conv_nd(dims, channels, out_channels, 3, padding=1)),
        )
        self.predict_codebook_ids = n_embed is not None
        if n_embed is not None:
            # `out` stays for the sake of the originals' state dicts; frozen, since nothing reaches it.
            self.out.requires_grad_(False)
            self.id_predictor = nn.Sequential(
                normalize(channels, num_groups, eps=1e-5), conv_nd(dims, channels, n_embed, 1)
            )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """The raw prediction at a noisy sample.

        Args:
            x: (B, in_channels, H, W), H and W multiples of 2^(levels - 1); (B, in_channels, L) with dims=1,
                (B, in_channels, D, H, W) with dims=3.
            timesteps: (B,) times, whole or fractional, in the units of training (usually [0, 1000)).
            context: (B, N, context_dim) conditioning tokens, or a list with one such tensor for each
                transformer block, if and only if the network has a `context_dim`.
            y: if and only if `num_classes` is set: (B,) int64 class numbers; (B,) or (B, 1) for
                "continuous"; (B,) for "timestep"; (B, adm_in_channels) for "sequential".

        Returns:
            (B, out_channels, H, W); logits (B, n_embed, H, W) where `n_embed` is set.

        Raises:
            ValueError: a shape that does not fit, or `y` or `context` missing or out of place.
        """
        self.check_inputs(x, timesteps, context, y)
        emb = self.embed(timesteps, y)
        h, skips = self.encode(x, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.id_predictor(h) if self.predict_codebook_ids else self.out(h)
