"""How a network is told the time: the sinusoidal embedding, and containers that pass it on.

Follows Ho et al. 2020 (https://arxiv.org/abs/2006.11239), which takes the position embedding of Vaswani et
al. 2017 (https://arxiv.org/abs/1706.03762, section 3.5) for the time, in the layout of OpenAI's
improved-diffusion: all cosines first, then all sines.
"""

import math

import torch
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of times t (B,), usually in [0, 1000) -> (B, dim), float32 (float64 for such a t).

    With half = dim // 2 and w_i = max_period^(-i / half), the result is
    [cos(t w_0) ... cos(t w_half-1), sin(t w_0) ... sin(t w_half-1)]; an odd `dim` ends in one zero.

    Raises:
        ValueError: `t` is not one-dimensional, or `dim` < 2.
    """
    if t.ndim != 1:
        raise ValueError(f"timestep_embedding: t has shape {tuple(t.shape)}, expected (B,)")
    if dim < 2:
        raise ValueError(f"timestep_embedding: dim={dim} is too small, at least 2 is needed")
    # Half precision cannot tell 999 from 1000, so the angles are never computed in it.
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    exponents = torch.arange(half, dtype=dtype, device=t.device) / half
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(max_period) * exponents)  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if dim % 2:
        embedding = nn.functional.pad(embedding, (0, 1))
    return embedding


class Timestep(nn.Module):
    """`timestep_embedding` as a layer without parameters: (B,) -> (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.dim)


def embedding_mlp(in_features: int, dim: int) -> nn.Sequential:
    """The small network behind an embedding of the time or of a label: (B, in_features) -> (B, dim)."""
    return nn.Sequential(nn.Linear(in_features, dim), nn.SiLU(), nn.Linear(dim, dim))


class TimestepBlock(nn.Module):
    """Base of the layers called as `layer(x, emb)`: those that take the time embedding."""


class ContextBlock(nn.Module):
    """Base of the layers called as `layer(x, context)`: those that attend to the conditioning tokens."""


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the time embedding and the context to the children that take them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | list[Tensor] | None = None) -> Tensor:
        """x (B, C, *spatial), emb (B, E), context (B, N, D) or a list of such -> (B, C', *spatial')."""
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, ContextBlock):
                x = layer(x, context)
            else:
                x = layer(x)
        return x
