"""The transformer of the latent UNet: self-attention, attention to the context, a gated feed-forward net.

Follows Rombach et al. 2021 (https://arxiv.org/abs/2112.10752, section 3.3 and appendix E.2.1), with the
parameter names of the original repository and of sgm.
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import CrossAttention
from ldm.nn.checkpoint import checkpoint
from ldm.nn.init import conv_nd, zero_module
from ldm.nn.resblock import normalize
from ldm.nn.timestep import ContextBlock


class GEGLU(nn.Module):
    """a * gelu(b) with (a, b) = proj(x) (Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(x) (Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6)."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.drop(self.w3(F.silu(a) * b))


class FeedForward(nn.Module):
    """Linear, GELU (GEGLU with `glu`), dropout, linear; `mult` times as wide inside. None keeps `dim`."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = mult * dim
        project_in = GEGLU(dim, inner_dim) if glu else nn.Sequential(nn.Linear(dim, inner_dim), nn.GELU())
        project_out = nn.Linear(inner_dim, dim if dim_out is None else dim_out)
        self.net = nn.Sequential(project_in, nn.Dropout(dropout), project_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim_out)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Pre-norm residual steps: self-attention (attn1), attention to the context (attn2), feed-forward (ff).

    Without a `context_dim` attn2 is a second self-attention; with `disable_self_attn` attn1 attends to the
    context too. `dropout` is in the output of both attentions and inside the feed-forward net.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        use_checkpoint: bool = False,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.disable_self_attn = disable_self_attn
        attn1_context_dim = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, attn1_context_dim, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, dim), context (B, M, context_dim) -> (B, N, dim)."""
        return checkpoint(self._forward, (x, context), self.use_checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(ContextBlock):
    """Transformer blocks over the positions of a feature map, between projections, with a residual.

    `proj_out` is zero-initialised. With depth 0 only the norm and the projections remain, as in sgm.

    Args:
        in_channels: channels of the feature map.
        n_heads, d_head: number of heads, and channels of each; n_heads * d_head is the inner width.
        depth: number of transformer blocks.
        dropout, disable_self_attn: see `BasicTransformerBlock`.
        context_dim: channels of the context; a list gives one for each block, or one for all of them.
        use_linear: linear layers on tokens instead of 1x1 convolutions as projections (SD 2, SDXL).
        use_checkpoint: recompute each transformer block in the backward pass.
        dims: spatial dimensions, 1, 2 or 3.
        num_groups: of the GroupNorm.

    Raises:
        ValueError: a list of context_dim or of contexts is as long neither as `depth` nor as 1.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = False,
        dims: int = 2,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        projection = nn.Linear if use_linear else partial(conv_nd, dims, kernel_size=1)
        self.use_linear = use_linear
        self.norm = normalize(in_channels, num_groups)
        self.proj_in = projection(in_channels, inner_dim)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=block_context_dim,
                disable_self_attn=disable_self_attn,
                use_checkpoint=use_checkpoint,
            )
            for block_context_dim in _context_dims(context_dim, depth)
        )
        self.proj_out = zero_module(projection(inner_dim, in_channels))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """x (B, C, *spatial), context (B, N, context_dim) or one such per block -> (B, C, *spatial)."""
        depth = len(self.transformer_blocks)
        contexts = [context] if context is None or isinstance(context, Tensor) else list(context)
        contexts = contexts * depth if len(contexts) == 1 else contexts
        if len(contexts) != depth:
            raise ValueError(f"SpatialTransformer: {len(contexts)} contexts given for {depth} blocks")
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        spatial = h.shape[2:]
        h = h.flatten(2).transpose(1, 2)  # (B, C, *spatial) -> (B, N, C)
        if self.use_linear:
            h = self.proj_in(h)
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            h = block(h, block_context)
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, spatial)  # (B, N, C) -> (B, C, *spatial)
        return x + (h if self.use_linear else self.proj_out(h))


def _context_dims(context_dim: int | Sequence[int] | None, depth: int) -> list[int | None]:
    """One context_dim for each of `depth` blocks."""
    if context_dim is None or isinstance(context_dim, int):
        return [context_dim] * depth
    dims = list(context_dim)
    if len(dims) == depth:
        return dims
    if len(set(dims)) != 1:
        raise ValueError(f"SpatialTransformer: context_dim={dims} must be 1 number, or depth={depth}")
    return dims[:1] * depth
