"""The Vision Transformer: image classifier and image encoder, and DeiT's distilled form of it.

Follows Dosovitskiy et al. 2020 (https://arxiv.org/abs/2010.11929) and Touvron et al. 2020
(https://arxiv.org/abs/2012.12877), with the arguments and parameter names of timm's
`models/vision_transformer.py`, so that its checkpoints load strictly.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.nn.checkpoint import checkpoint
from ldm.nn.patch import PatchEmbed, Size, as_pair, interpolate_positions
from ldm.nn.sequence_attention import ViTAttention
from ldm.wording import check_choice

_BACKBONES = {  # patch_size, embed_dim, depth, num_heads
    "vit_base_patch16_224": (16, 768, 12, 12),
    "vit_base_patch32_224": (32, 768, 12, 12),
    "vit_large_patch16_224": (16, 1024, 24, 16),
    "vit_large_patch32_224": (32, 1024, 24, 16),
    "vit_huge_patch14_224": (14, 1280, 32, 16),
}

#: name -> arguments of `VisionTransformer`. Each size has ImageNet-1k's head, and as `..._in21k` that of
#: ImageNet-21k with the representation layer. (Weights exist for all but large/32 and huge/14 on 1k.)
VIT_SIZES: dict[str, dict[str, int]] = {
    name + suffix: {
        "img_size": 224,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": num_classes,
        "representation_size": embed_dim if suffix else 0,
    }
    for suffix, num_classes in (("", 1000), ("_in21k", 21843))
    for name, (patch_size, embed_dim, depth, num_heads) in _BACKBONES.items()
}


def published_numbers(
    network: str, size: str | None, sizes: Mapping[str, Mapping[str, int]], **given: Any
) -> dict[str, Any]:
    """`given`, with what is None taken from the published size; ValueError for what is then still None."""
    if size is not None:
        check_choice(f"{network}: size", size, sizes)
    published = {} if size is None else sizes[size]
    numbers = {name: published.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in numbers.items() if value is None]
    if missing:
        raise ValueError(f"{network}: without a size, give {', '.join(missing)} too")
    return numbers


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382): in training the residual branch
    of each sample is zero with probability `rate`, in [0, 1) (else ValueError), or divided by 1 - rate.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"DropPath: rate={rate} is not in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (keep / (1.0 - self.rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Mlp(nn.Module):
    """Linear, GELU (`approximate` "none" in ViT, "tanh" in DiT), linear, with dropout after both."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Dosovitskiy et al. 2020, eqs. 2-3)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ViTAttention(dim, num_heads, qkv_bias, dropout=attention_dropout, proj_dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@remembers_arguments
class VisionTransformer(nn.Module):
    """Images to class logits, or to one feature vector for each patch.

    `size` names a published network (a key of `VIT_SIZES`), whose numbers hold where the arguments down to
    `representation_size` are None; without it, all of them but the last must be given.

    Args:
        size: a key of `VIT_SIZES`, or None.
        img_size: height and width, an int or (H, W).
        patch_size: of the patches, an int or (p, q).
        embed_dim, depth, num_heads: channels, blocks, and heads of each.
        num_classes: logits; 0 leaves the head out, and `forward` returns the class token's features. A
            training config may say "auto", and has the data's number put in.
        representation_size: width of a linear layer with tanh before the head (`pre_logits.fc`); 0 for none.
        in_chans: channels of the images.
        mlp_ratio: inner width of the mlp over `embed_dim`.
        qkv_bias: whether queries, keys and values have a bias.
        distilled: a distillation token beside the class token, with a head of its own (DeiT).
        drop_rate: dropout of the embedded tokens and of the outputs of attention and mlp.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        dynamic_img_size: take every multiple of the patch size, with interpolated positions.
        use_checkpoint: recompute each block in the backward pass (less memory, more time).
        init_std: deviation of the matrices before training; networks much narrower than the published ones
            learn faster from about 1 / sqrt(embed_dim).

    Raises:
        ValueError: unknown `size`, or a number missing without it; sizes that do not divide;
            `representation_size` with `distilled`.
    """

    def __init__(
        self,
        size: str | None = None,
        *,
        img_size: Size | None = None,
        patch_size: Size | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        num_classes: int | Literal["auto"] | None = None,
        representation_size: int | None = None,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        distilled: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        use_checkpoint: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        no_layer = representation_size is None and (distilled or size is None)
        numbers = published_numbers(
            "VisionTransformer",
            size,
            VIT_SIZES,
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            representation_size=0 if no_layer else representation_size,
        )
        img_size, patch_size = as_pair(numbers["img_size"], "img_size"), numbers["patch_size"]
        self.embed_dim = embed_dim = numbers["embed_dim"]
        self.num_classes = num_classes = numbers["num_classes"]
        if num_classes == "auto":
            raise ValueError('VisionTransformer: num_classes="auto" is for training configs alone')
        depth, num_heads = numbers["depth"], numbers["num_heads"]
        representation_size = numbers["representation_size"]
        if distilled and representation_size:
            raise ValueError(
                f"representation_size={representation_size} and distilled=True exclude each other"
            )
        self.use_checkpoint = use_checkpoint
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, None if dynamic_img_size else img_size)
        self.grid_size = self.patch_embed.grid(*img_size)
        self.num_prefix_tokens = 2 if distilled else 1
        tokens = self.num_prefix_tokens + math.prod(self.grid_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, rate)
            for rate in linear_decay(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pre_logits = nn.Sequential()
        if representation_size:
            self.pre_logits.add_module("fc", nn.Linear(embed_dim, representation_size))
            self.pre_logits.add_module("act", nn.Tanh())
        head = (
            partial(nn.Linear, representation_size or embed_dim, num_classes) if num_classes else nn.Identity
        )
        self.head = head()
        self.head_dist = head() if distilled else None
        self._initialize(init_std)

    def _initialize(self, std: float) -> None:
        """Normal, cut at two deviations: `std` for matrices, 0.02 for tokens and positions. Zero biases."""
        for parameter in (self.cls_token, self.pos_embed, self.dist_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, prefix + N, embed_dim) after the last norm.

        The class token comes first, then the distillation token where there is one, then the patches in
        row-major order. The images have the value range of the training: [-1, 1] for the weights of
        ViT's authors, ImageNet's mean and deviation for DeiT's. ValueErrors as in `PatchEmbed`.
        """
        tokens = self.patch_embed(x)
        grid = self.patch_embed.grid(*x.shape[2:])
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        x = torch.cat([token.expand(len(x), -1, -1) for token in prefix] + [tokens], dim=1)
        positions = interpolate_positions(self.pos_embed, self.grid_size, grid, self.num_prefix_tokens)
        x = self.pos_drop(x + positions)
        for block in self.blocks:
            x = checkpoint(block, (x,), self.use_checkpoint)
        return self.norm(x)

    def forward_heads(self, features: Tensor) -> tuple[Tensor, ...]:
        """`forward_features`' result -> the logits of each head: (class,) or (class, distillation).

        Distillation trains the first on the labels, the second on the teacher (Touvron et al. 2020, eq. 3).
        """
        logits = self.head(self.pre_logits(features[:, 0]))
        return (logits,) if self.head_dist is None else (logits, self.head_dist(features[:, 1]))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes); the mean of both heads where there are two.

        Without classes, (B, embed_dim) features (`representation_size` where that layer exists).
        """
        logits = self.forward_heads(self.forward_features(x))
        return logits[0] if len(logits) == 1 else sum(logits) / len(logits)


def linear_decay(rate: float, depth: int) -> list[float]:
    """Drop rates that grow linearly from 0 in the first to `rate` in the last of `depth` blocks (Huang et al.
    2016, https://arxiv.org/abs/1603.09382, eq. 4, with timm's end points)."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def fit_positions(
    state_dict: Mapping[str, Tensor], model: VisionTransformer, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A state dict of another image size, its position embedding brought to the grid of `model`.

    `grid` (h, w) are the patches of the state dict, None for a square. Raises ValueError where there is no
    `pos_embed`, or its length does not belong to `grid` or to any square.
    """
    if "pos_embed" not in state_dict:
        raise ValueError("fit_positions: the state dict has no 'pos_embed'")
    positions = state_dict["pos_embed"]
    if grid is None:
        patches = positions.shape[1] - model.num_prefix_tokens
        side = math.isqrt(max(patches, 0))
        if side * side != patches:
            raise ValueError(f"fit_positions: {patches} patches are no square; give their grid as (h, w)")
        grid = (side, side)
    fitted = interpolate_positions(positions, grid, model.grid_size, model.num_prefix_tokens)
    return {**state_dict, "pos_embed": fitted}
