"""Images as sequences of patches, back again, and where in the image each patch lies.

Patches are in row-major order: token i * w + j is row i, column j of the (h, w) grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.wording import check_choice

Size = int | Sequence[int]


def as_pair(size: Size, name: str) -> tuple[int, int]:
    """An int for a square, or (height, width) -> (height, width); ValueError for anything else."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{name}={size!r} is not a positive int or a pair (height, width) of such")
    return pair


class PatchEmbed(nn.Module):
    """A linear map of each patch of an image (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929,
    eq. 1).

    `method="conv"` is a strided convolution, `proj.weight` (dim, C, p, q), as in timm's and DiT's weights;
    `method="linear"` cuts the patches out and multiplies them, `proj.weight` (dim, C * p * q): the flattened
    kernel, `weight.flatten(1)`. The results are equal.

    Args:
        patch_size: p, or (p, q) = (height, width).
        in_channels: C of the image.
        dim: channels of a token.
        image_size: the one size that is taken, an int or (H, W); None takes every multiple of `patch_size`.

    Attributes:
        grid_size: (H / p, W / q) of `image_size`, or None.

    Raises:
        ValueError: `image_size` is no multiple of `patch_size`, or there is no such `method`.
    """

    def __init__(
        self,
        patch_size: Size,
        in_channels: int = 3,
        dim: int = 768,
        image_size: Size | None = None,
        method: str = "conv",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = p, q = as_pair(patch_size, "patch_size")
        self.in_channels = in_channels
        self.image_size = None if image_size is None else as_pair(image_size, "image_size")
        self.grid_size = None if self.image_size is None else self.grid(*self.image_size)
        self.method = method
        check_choice("PatchEmbed: method", method, ("conv", "linear"))
        if method == "conv":
            self.proj = nn.Conv2d(in_channels, dim, kernel_size=(p, q), stride=(p, q), bias=bias)
        else:
            self.proj = nn.Linear(in_channels * p * q, dim, bias=bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of that size; ValueError where they do not fill it."""
        p, q = self.patch_size
        if height % p or width % q or not (height and width):
            raise ValueError(f"PatchEmbed: {height}x{width} does not divide into patches of {p}x{q}")
        return height // p, width // q

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/p * W/q, dim); ValueError for other channels or a size that is not taken."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"PatchEmbed: x is {tuple(x.shape)}, expected (B, {self.in_channels}, H, W)")
        if self.image_size not in (None, tuple(x.shape[2:])):
            given, built = ("x".join(map(str, size)) for size in (x.shape[2:], self.image_size))
            raise ValueError(f"PatchEmbed: x is {given}, but the network is built for {built}")
        self.grid(*x.shape[2:])
        if self.method == "conv":
            return self.proj(x).flatten(2).transpose(1, 2)  # (B, dim, h, w) -> (B, h w, dim)
        p, q = self.patch_size
        return self.proj(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q))


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """(B, h * w, p * q * C) -> (B, C, h * p, w * q), the channels last within a token, as in DiT."""
    (h, w), (p, q) = grid, patch_size
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)


def _coordinates(
    dim: int,
    grid: tuple[int, int],
    base_grid: tuple[int, int] | None,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Row and column of each of the h * w patches, in units of `base_grid`'s patches, for `dim` channels."""
    if dim < 4 or dim % 4:
        raise ValueError(f"positions in two dimensions need a multiple of 4 channels, not {dim}")
    row, column = (
        torch.arange(n, dtype=dtype, device=device) * (base / n)
        for n, base in zip(grid, base_grid or grid, strict=True)
    )
    return row.repeat_interleave(grid[1]), column.repeat(grid[0])


def sincos_positions(dim: int, grid: tuple[int, int], base_grid: tuple[int, int] | None = None) -> Tensor:
    """The fixed position embedding of MAE and DiT: sines, then cosines, of the column, then of the row.

    With D = dim / 4 and w_i = 10000^(-i / D): [sin(x w), cos(x w), sin(y w), cos(y w)] for column x, row y
    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5, for each axis; the order is that of
    the repositories facebookresearch/mae and facebookresearch/DiT).

    `grid` (h, w) gives (h * w, dim) in float32; `base_grid` is that of the training, over whose range `grid`
    is laid. ValueError unless `dim` is a multiple of 4.
    """
    coordinates = _coordinates(dim, grid, base_grid, torch.float64)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = (position[:, None] * frequencies for position in coordinates)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


def rotary_positions(
    head_dim: int,
    grid: tuple[int, int],
    base_grid: tuple[int, int] | None = None,
    theta: float = 10000.0,
    device: torch.device | None = None,
) -> Tensor:
    """Rotary position embedding in two dimensions: half of the pairs turn with the row, half with the column.

    Angle i of an axis is position * theta^(-i / D), D = head_dim / 4 (Su et al. 2021,
    https://arxiv.org/abs/2104.09864, eq. 15, for each axis as in EVA-02, https://arxiv.org/abs/2303.11331).

    Returns (2, h * w, head_dim / 2) in float32, cosines and sines for `ldm.nn.sequence_attention.rotate`;
    `grid`, `base_grid` and the ValueError as in `sincos_positions`.
    """
    coordinates = _coordinates(head_dim, grid, base_grid, torch.float32, device)
    exponents = torch.arange(head_dim // 4, dtype=torch.float32, device=device) / (head_dim // 4)
    angles = torch.cat([position[:, None] * theta**-exponents for position in coordinates], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def interpolate_positions(
    positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], prefix_tokens: int = 0
) -> Tensor:
    """A learned position embedding for another number of patches: bicubic, antialiased, as in timm.

    (1, prefix_tokens + h * w, dim) for `grid` (h, w) -> (1, prefix_tokens + h' * w', dim) for `new_grid`. The
    embeddings of tokens that belong to no patch stand first and are kept. `positions` comes back itself where
    the grid stays; another length than grid and `prefix_tokens` say is a ValueError.
    """
    expected = prefix_tokens + grid[0] * grid[1]
    if positions.ndim != 3 or positions.shape[:2] != (1, expected):
        raise ValueError(f"position embedding is {tuple(positions.shape)}, expected (1, {expected}, dim)")
    if tuple(grid) == tuple(new_grid):
        return positions
    prefix, patches = positions[:, :prefix_tokens], positions[:, prefix_tokens:]
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))  # half precision has no bicubic
    patches = rearrange(patches, "1 (h w) d -> 1 d h w", h=grid[0])
    patches = F.interpolate(
        patches, size=tuple(new_grid), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([prefix, rearrange(patches, "1 d h w -> 1 (h w) d").to(positions.dtype)], dim=1)
