"""Attention over a sequence of tokens: one function, `attend`, and thin layers that differ in projections.

softmax(q k^T / sqrt(d_k)) v (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1) through
`torch.nn.functional.scaled_dot_product_attention`. Parameter names are those of the implementations that
each layer stands for. In all layers `dim` is the channels of the tokens, in and out, `heads` must divide it
(ValueError), `dropout` is the probability that an attention weight is zero in training, and masks are
`attend`'s.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.wording import check_choice


def check_divides(name: str, parts: int, channels: int) -> None:
    """ValueError unless `parts`, which the caller knows as `name`, divides `channels`."""
    if parts < 1 or channels % parts:
        raise ValueError(f"{name}={parts} does not divide {channels} channels")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return rearrange(x, "b n (heads d) -> b heads n d", heads=heads)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Softmax attention of all heads, the heads laid side by side.

    Args:
        query: (B, heads, N, d_k).
        key: (B, heads, M, d_k).
        value: (B, heads, M, d_v); d_v need not be d_k.
        mask: bool, or integers of which 0 is False; True where a key may be attended to. (B, M) for all
            queries alike, (B, N, M), or (B, heads or 1, N, M). Every query needs at least one such key; one
            that has none gets zeros.
        dropout: probability that an attention weight is zero; the caller passes 0 outside of training.
        causal: query i sees the keys 0 to i alone, besides what `mask` says.

    Returns:
        (B, N, heads * d_v).

    Raises:
        ValueError: the mask is of another shape, or neither bool nor integer.
    """
    if mask is not None:
        mask = _broadcast_mask(mask, query, key)
        if causal:
            mask = mask & mask.new_ones(query.shape[2], key.shape[2]).tril()
    # Fused kernels want the channels innermost; otherwise the weights of all pairs would be written out.
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None
    )
    return rearrange(out, "b heads n d -> b n (heads d)")


def attend_tokens(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None, **options
) -> Tensor:
    """`attend` of (B, N, heads * d_k), (B, M, heads * d_k), (B, M, heads * d_v) -> (B, N, heads * d_v)."""
    return attend(*(split_heads(tokens, heads) for tokens in (query, key, value)), mask, **options)


def _broadcast_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask of any of `attend`'s shapes -> bool (B, heads or 1, N or 1, M)."""
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"attention mask is {mask.dtype}; expected bool or integers, True or 1 = may attend")
    (batch, heads, queries), keys = query.shape[:3], key.shape[2]
    allowed = (batch, keys), (batch, queries, keys), (batch, 1, queries, keys), (batch, heads, queries, keys)
    if tuple(mask.shape) not in allowed:
        expected = ", ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(f"attention mask has shape {tuple(mask.shape)}; expected one of {expected}")
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    elif mask.ndim == 3:
        mask = mask[:, None]
    return mask.bool()


class SelfAttention(nn.Module):
    """One head without an output projection; None keeps `dim` for the channels of keys and of values."""

    def __init__(self, dim: int, dim_key: int | None = None, dim_value: int | None = None) -> None:
        super().__init__()
        dim_key = dim if dim_key is None else dim_key
        self.q = nn.Linear(dim, dim_key)
        self.k = nn.Linear(dim, dim_key)
        self.v = nn.Linear(dim, dim if dim_value is None else dim_value)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim_value)."""
        return attend_tokens(self.q(x), self.k(x), self.v(x), 1, mask)


class MultiHeadAttention(nn.Module):
    """Attention with several heads (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.2);
    `bias` is that of the four projections."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        check_divides("MultiHeadAttention: heads", heads, dim)
        self.heads, self.dropout = heads, dropout
        self.W_q = nn.Linear(dim, dim, bias=bias)
        self.W_k = nn.Linear(dim, dim, bias=bias)
        self.W_v = nn.Linear(dim, dim, bias=bias)
        self.W_o = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """query (B, N, dim), key (default: query) and value (default: key) (B, M, dim) -> (B, N, dim).

        `mask` as in `attend`, or (B * heads, N, M) with a sequence's heads one after the other.
        """
        key = query if key is None else key
        value = key if value is None else value
        if mask is not None and mask.ndim == 3 and mask.shape[0] == query.shape[0] * self.heads:
            mask = rearrange(mask, "(b heads) n m -> b heads n m", heads=self.heads)
        q, k, v = self.W_q(query), self.W_k(key), self.W_v(value)
        dropout = self.dropout if self.training else 0.0
        return self.W_o(attend_tokens(q, k, v, self.heads, mask, dropout=dropout))


class FusedSelfAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values, in this order, as in SD's text encoder
    and autoencoder written from scratch (names `in_proj`, `out_proj`)."""

    def __init__(
        self, dim: int, heads: int, in_bias: bool = True, out_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_divides("FusedSelfAttention: heads", heads, dim)
        self.heads, self.dropout = heads, dropout
        self.in_proj = nn.Linear(dim, 3 * dim, bias=in_bias)
        self.out_proj = nn.Linear(dim, dim, bias=out_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, N, dim) -> (B, N, dim); `mask` and `causal` as in `attend`."""
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend_tokens(q, k, v, self.heads, mask, dropout=dropout, causal=causal))


class ContextAttention(nn.Module):
    """Attention of tokens to a context of its own width (names `q_proj`, `k_proj`, `v_proj`, `out_proj`).

    `ldm.nn.attention.CrossAttention` is the same with the latent diffusion UNet's names and head width.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        in_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_divides("ContextAttention: heads", heads, dim)
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(dim, dim, bias=in_bias)
        self.k_proj = nn.Linear(context_dim, dim, bias=in_bias)
        self.v_proj = nn.Linear(context_dim, dim, bias=in_bias)
        self.out_proj = nn.Linear(dim, dim, bias=out_bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, dim), context (B, M, context_dim) -> (B, N, dim)."""
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend_tokens(q, k, v, self.heads, mask, dropout=dropout))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last axis (Zhang & Sennrich 2019,
    https://arxiv.org/abs/1910.07467, eq. 4), in the dtype of x.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        # Under autocast x is in half precision and the weight is not; the fused kernel wants them alike.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


_QK_NORMS = {None: nn.Identity, "layer": lambda dim: nn.LayerNorm(dim, eps=1e-6), "rms": RMSNorm}


class ViTAttention(nn.Module):
    """Self-attention of ViT and DiT, with timm's names (`qkv`, `q_norm`, `k_norm`, `proj`).

    `qk_norm` is a norm over each head's queries and keys, which keeps the logits bounded (Dehghani et al.
    2023, https://arxiv.org/abs/2302.05442, section 2.1): None, "layer" or "rms", else ValueError.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qkv_bias: bool = True,
        qk_norm: str | None = None,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_divides("ViTAttention: heads", heads, dim)
        check_choice("ViTAttention: qk_norm", qk_norm, _QK_NORMS)
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = _QK_NORMS[qk_norm](dim // heads)
        self.k_norm = _QK_NORMS[qk_norm](dim // heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, rotary: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim).

        `rotary` (2, N, dim / heads / 2): cosines and sines of the angles by which queries and keys are
        turned, see `rotate` and `ldm.nn.patch.rotary_positions`.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        # Norms and rotation may have gone up to float32, under autocast or beside half-precision weights.
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.proj_drop(self.proj(attend(q, k, v, mask, self.dropout if self.training else 0.0)))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each neighbouring pair of channels, as a point in the plane, by its position's angle.

    x (B, heads, N, d), d even; rotary (2, N, d / 2), the angles' cosines and sines -> (B, heads, N, d). The
    product of two vectors so turned depends on the difference of their angles alone (Su et al. 2021,
    https://arxiv.org/abs/2104.09864, section 3.2).
    """
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, d / 2) each
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
