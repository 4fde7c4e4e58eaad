"""Attention over the positions of a feature map, and over conditioning tokens.

All softmax attention is `ldm.nn.sequence_attention.attend`. Parameter names are the original repositories'.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, einsum, nn

from ldm.nn.channel_attention import CBAM, EfficientChannelAttention, SqueezeExcitation
from ldm.nn.checkpoint import checkpoint
from ldm.nn.init import zero_module
from ldm.nn.resblock import normalize
from ldm.nn.sequence_attention import attend, attend_tokens, check_divides
from ldm.wording import check_choice


class AttnBlock(nn.Module):
    """The autoencoder's single-head self-attention over positions, with 1x1 convolutions and a residual.

    x + proj_out(attention(q, k, v of norm(x))), after taming-transformers (https://arxiv.org/abs/2012.09841).
    """

    def __init__(self, in_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.norm = normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        h = rearrange(attend(q, k, v), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class LinearAttention(nn.Module):
    """Attention linear in the number of positions: softmax over the keys' positions, context = k v^T.

    out = to_out(context^T q), without scale and without a softmax over q, as in the latent diffusion
    repository (after Katharopoulos et al. 2020 and Shen et al. 2018, https://arxiv.org/abs/1812.01243).
    `heads` of `dim_head` channels each; `dim` channels in and out.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = rearrange(
            self.to_qkv(x), "b (three heads d) h w -> three b heads d (h w)", three=3, heads=self.heads
        )
        context = einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
        out = einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(rearrange(out, "b heads e (h w) -> b (heads e) h w", h=x.shape[2]))


class LinAttnBlock(LinearAttention):
    """`LinearAttention` with one head of all channels; as in the original without norm and residual."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


#: attn_type -> builder(channels, **options) of a module (B, C, H, W) -> (B, C, H, W); one with `num_groups`
#: among its parameters is given that of the network.
ATTENTION_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "vanilla": AttnBlock,
    # sgm's name for the same function and parameters on another kernel.
    "vanilla-xformers": AttnBlock,
    "linear": LinAttnBlock,
    "se": SqueezeExcitation,
    "cbam": CBAM,
    "eca": EfficientChannelAttention,
    "none": nn.Identity,
}


def make_attn(
    in_channels: int,
    attn_type: str = "vanilla",
    num_groups: int = 32,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The attention of a convolutional network by its name in a config.

    Args:
        in_channels: channels of the feature map, kept.
        attn_type: a key of `ATTENTION_BUILDERS`: `vanilla` and `linear` mix positions; `se`, `cbam` and `eca`
            weigh channels (cbam also places); `none` does nothing.
        num_groups: of the GroupNorm, where the kind has one.
        options: of the kind: `reduction` (se, cbam), `kernel_size` and `parts` (cbam: both, channel or
            spatial), `gamma` and `b` (eca).

    Raises:
        ValueError: unknown `attn_type` or option, or a number that does not fit the channels.
    """
    check_choice("attn_type", attn_type, ATTENTION_BUILDERS)
    builder, options = ATTENTION_BUILDERS[attn_type], dict(options or {})
    parameters = inspect.signature(builder).parameters
    named = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    for option in options:
        check_choice(f"an option of attn_type={attn_type!r}", option, [n for n in named if n != "num_groups"])
    if "num_groups" in named:
        options["num_groups"] = num_groups
    return builder(in_channels, **options)


class QKVAttention(nn.Module):
    """Self-attention on stacked queries, keys and values, without parameters.

    Two layouts of the 3C channels exist in published weights: the legacy one splits the heads first
    (head 0's q, k, v, then head 1's, ...), the new one q, k, v first (all heads' q, then all k, then all v).
    The originals scale q and k by d^-1/4 each, which is the 1 / sqrt(d) of `scaled_dot_product_attention`.
    """

    def __init__(self, num_heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layout = "(three heads d)" if new_order else "(heads three d)"

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, 3C, T) -> (B, C, T)."""
        q, k, v = rearrange(qkv, f"b {self.layout} t -> three b heads t d", three=3, heads=self.num_heads)
        return attend(q, k, v).transpose(1, 2)


class AttentionBlock(nn.Module):
    """The pixel-space UNet's multi-head self-attention over all positions, with a residual.

    Follows guided-diffusion (https://arxiv.org/abs/2105.05233): x + proj_out(attention(qkv(norm(x)))), with
    `proj_out` zero-initialised.

    There are `num_heads`, or where it is not -1 as many as `num_head_channels` gives, which must divide the
    channels (ValueError); `use_new_attention_order` as in `QKVAttention`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        if num_head_channels == -1:
            check_divides("AttentionBlock: num_heads", num_heads, channels)
        else:
            check_divides("AttentionBlock: num_head_channels", num_head_channels, channels)
            num_heads = channels // num_head_channels
        self.use_checkpoint = use_checkpoint
        self.norm = normalize(channels, num_groups, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(num_heads, use_new_attention_order)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial)."""
        return checkpoint(self._forward, (x,), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, T)
        return x + self.proj_out(self.attention(qkv)).reshape(x.shape)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves where there is none (Rombach et al. 2021,
    https://arxiv.org/abs/2112.10752, section 3.3).

    None for `context_dim` means `query_dim`; `dim_head` need not be `query_dim / heads`; `dropout` is the
    probability of a zero in the output.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, N, query_dim), context (B, M, context_dim) or None for x -> (B, N, query_dim).

        `mask` and its ValueError as in `attend`.
        """
        context = x if context is None else context
        return self.to_out(
            attend_tokens(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, mask)
        )
