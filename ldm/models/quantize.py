"""Vector quantization with a learned codebook (van den Oord et al. 2017, arXiv:1711.00937)."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.nn.precision import autocast_off

_CHUNK_DISTANCES = 1 << 23  # 64 MiB of float64


class VQOutput(NamedTuple):
    """What quantizing (B, D, H, W) gives.

    `quantized` (B, D, H, W): the codes; its gradient passes straight through to the input.
    `codebook_loss` (): codebook and commitment terms, weighted by beta.
    `indices` (B*H*W,) int64, or (B, H, W) with `sane_index_shape`; remapped where a remap is set.
    `perplexity` (): exp of the entropy of the code frequencies in this batch, 1 ... n_embed.
    `codebook_use` (): share of the codebook that this batch uses, 0 ... 1.
    """

    quantized: Tensor
    codebook_loss: Tensor
    indices: Tensor
    perplexity: Tensor
    codebook_use: Tensor


class VectorQuantizer(nn.Module):
    """Nearest code of a codebook (`embedding`, n_embed x embed_dim), with a straight-through gradient.

    `beta` weighs the commitment term (eq. 3 of the paper):
        legacy=False: |sg[q] - z|^2 * beta + |q - sg[z]|^2, as in the paper.
        legacy=True:  |sg[q] - z|^2 + |q - sg[z]|^2 * beta, as in the original latent diffusion code.

    `remap`: the codes in use (a `.npy` or `.txt` file of int64 indices, or a sequence); `indices` then count
    within that list. An index outside the list becomes, by `unknown_index`,
        "random": a used code chosen by a fixed hash of the index (the original draws one each time),
        "extra":  one more index, len(used), which decodes as used code 0,
        an int:   that index of the list.
    """

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        beta: float = 0.25,
        remap: str | os.PathLike | list[int] | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        self.n_embed, self.embed_dim, self.beta = n_embed, embed_dim, beta
        self.sane_index_shape, self.legacy = sane_index_shape, legacy
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_embed, 1.0 / n_embed)
        self.remap = remap
        if remap is not None:
            self.register_buffer("used", _read_used(remap, n_embed))
            self.unknown_index = _check_unknown(unknown_index, len(self.used))

    @property
    def index_count(self) -> int:
        """How many different values `indices` can take."""
        if self.remap is None:
            return self.n_embed
        return len(self.used) + (self.unknown_index == "extra")

    def forward(self, z: Tensor) -> VQOutput:
        """(B, embed_dim, H, W) -> VQOutput in float32, `quantized` in the codebook's type; ValueError for
        another number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.embed_dim:
            raise ValueError(f"expected a latent (B, {self.embed_dim}, H, W), got {tuple(z.shape)}")
        with autocast_off(z):
            z = z.float()
            batch, _, height, width = z.shape
            rows = z.permute(0, 2, 3, 1).reshape(-1, self.embed_dim)  # (B*H*W, D)
            indices = self.nearest(rows)
            codes = self.embedding(indices)
            towards_code = (codes.detach() - rows).square().mean()
            towards_input = (codes - rows.detach()).square().mean()
            if not self.legacy:
                towards_code, towards_input = towards_input, towards_code
            loss = towards_code + self.beta * towards_input
            perplexity, use = self._usage(indices)
            codes = codes.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()  # (B, D, H, W)
            quantized = (z + (codes - z).detach()).to(self.embedding.weight.dtype)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if self.sane_index_shape:
            indices = indices.view(batch, height, width)
        return VQOutput(quantized, loss, indices, perplexity, use)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """(N, embed_dim) -> (N,) int64, the nearest code of each row; of equals the first.

        |z - e|^2 without the constant |z|^2, as one matrix product a chunk of rows. In float64 (float32 on
        MPS, which has no other): TF32 or bf16 products would choose wrong codes, and so would cancellation.
        """
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        codebook = self.embedding.weight.to(dtype)
        norms = codebook.square().sum(dim=1)
        chunks = rows.split(max(1, _CHUNK_DISTANCES // self.n_embed))
        return torch.cat(
            [torch.addmm(norms, part.to(dtype), codebook.t(), alpha=-2).argmin(dim=1) for part in chunks]
        )

    def embed(self, indices: Tensor, shape: tuple[int, int, int] | None = None) -> Tensor:
        """Codes of `indices`, which count as this quantizer's output does, remapping included.

        `indices` (B, H, W), or any shape together with `shape` = (B, H, W). Returns (B, embed_dim, H, W).
        ValueError for an index out of range or a shape that does not fit.
        """
        shape = tuple(indices.shape) if shape is None else tuple(shape)
        if len(shape) != 3 or indices.numel() != shape[0] * shape[1] * shape[2]:
            raise ValueError(f"{tuple(indices.shape)} indices do not fit the grid (B, H, W) = {shape}")
        flat = indices.reshape(-1).long()
        if flat.numel() and (flat.min() < 0 or flat.max() >= self.index_count):
            found = f"{int(flat.min())}...{int(flat.max())}"
            raise ValueError(f"indices lie in {found}; allowed are 0...{self.index_count - 1}")
        if self.remap is not None:
            flat = self.unmap_to_all(flat)
        return self.embedding(flat).view(*shape, self.embed_dim).permute(0, 3, 1, 2).contiguous()

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Indices of the whole codebook -> indices within `used`, unknown ones by `unknown_index`."""
        count = len(self.used)
        table = torch.arange(self.n_embed, device=self.used.device)
        if self.unknown_index == "random":
            table = (table * 2654435761 % 2**32) % count  # Knuth's multiplicative hash
        else:
            table.fill_(count if self.unknown_index == "extra" else self.unknown_index)
        table[self.used] = torch.arange(count, device=self.used.device)
        return table[indices]

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """The inverse of `remap_to_used` on used codes; the extra index becomes used code 0."""
        return self.used[torch.where(indices < len(self.used), indices, torch.zeros_like(indices))]

    @torch.no_grad()
    def _usage(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Perplexity and share of used codes, from counts: no one-hot matrix, no host sync."""
        counts = torch.zeros(self.n_embed, device=indices.device)
        counts.index_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
        frequency = counts / indices.numel()
        return torch.special.entr(frequency).sum().exp(), (counts > 0).float().mean()


def _read_used(remap: str | os.PathLike | list[int], n_embed: int) -> Tensor:
    if isinstance(remap, str | os.PathLike):
        path = Path(remap).expanduser()
        if not path.is_file():
            raise ValueError(f"remap: no file at {path}")
        if path.suffix == ".npy":
            import numpy as np

            used = torch.from_numpy(np.load(path, allow_pickle=False).astype("int64"))
        elif path.suffix == ".txt":
            used = _numbers(path.read_text().split())
        else:
            raise ValueError(f"remap: {path} is neither a .npy nor a .txt file of code indices")
    else:
        used = _numbers(remap)
    if used.ndim != 1 or len(used) == 0 or used.min() < 0 or used.max() >= n_embed:
        raise ValueError(f"remap: expected code indices within 0...{n_embed - 1}, got {used.tolist()[:8]}...")
    if len(used.unique()) != len(used):
        raise ValueError("remap: a code index occurs twice")
    return used


def _check_unknown(unknown_index: str | int, count: int) -> str | int:
    is_index = isinstance(unknown_index, int) and not isinstance(unknown_index, bool)
    if unknown_index in ("random", "extra") or (is_index and 0 <= unknown_index < count):
        return unknown_index
    raise ValueError(
        f'unknown_index: "random", "extra" or an index within 0...{count - 1}, got {unknown_index!r}'
    )


def _numbers(values: list) -> Tensor:
    # The device is said, so that a model built under a meta device still gets numbers.
    return torch.tensor([int(value) for value in values], dtype=torch.int64, device="cpu")
