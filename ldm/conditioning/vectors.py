"""Numbers and ready-made features as conditions."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning.conditioner import Embedder, zero_dropped
from ldm.nn.timestep import timestep_embedding


@remembers_arguments
class ClassFeatures(Embedder):
    """Class label -> its row of a table, as one token (B, 1, dim) or as a vector (B, dim).

    Unlike `ClassEmbedder`, the absent class has no row of its own: it is all zeros (sgm), or unknown (the
    original latent diffusion, whose users kept a class for it). The parameter is `embedding.weight`.

    Args:
        num_classes, dim: size of the table.
        kind: "crossattn" or "vector".
        key, also: of the batch; `also` are other names that it may have.
        absent: "zeros" or "none".
    """

    kinds = ("crossattn", "vector")

    def __init__(
        self,
        num_classes: int,
        dim: int,
        kind: Literal["crossattn", "vector"] = "crossattn",
        drop: float = 0.0,
        key: str = "label",
        also: Sequence[str] = (),
        absent: Literal["zeros", "none"] = "none",
    ):
        super().__init__(key, kind, drop)
        if drop > 0 and absent == "none":
            raise ValueError("ClassFeatures: drop > 0 needs absent='zeros'")
        self.num_classes, self.absent, self.also = num_classes, absent, tuple(also)
        self.embedding = nn.Embedding(num_classes, dim)

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        rows = self.embedding(values)
        rows = rows[:, None] if self.kind == "crossattn" else rows
        return zero_dropped(rows, dropped)

    def null_values(self, batch_size: int, device: torch.device) -> Tensor:
        if self.absent == "none":
            raise ValueError(
                f"no absent class is known (some published models keep the last of {self.num_classes}): give "
                f"an explicit `uncond`, such as conditioner({{{self.key!r}: labels of that class}})"
            )
        return torch.zeros(batch_size, dtype=torch.long, device=device)


@remembers_arguments
class Labels(Embedder):
    """Class labels as they are, for a network that embeds them itself and knows no absent class (ADM)."""

    def __init__(self, num_classes: int, key: str = "label", also: Sequence[str] = ()):
        super().__init__(key, "vector", 0.0)
        self.num_classes, self.also = num_classes, tuple(also)

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        return values

    def null_values(self, batch_size: int, device: torch.device) -> Tensor:
        raise ValueError("this model knows no absent class: it cannot be guided without a classifier")


@remembers_arguments
class SinusoidalNumbers(Embedder):
    """Numbers (B,) or (B, n), such as sizes in pixels -> vector (B, n * dim), each embedded as a timestep.

    sgm's ConcatTimestepEmbedderND (Podell et al. 2023, https://arxiv.org/abs/2307.01952, section 2.2). It has
    no parameters; the absent value is zeros.
    """

    def __init__(self, key: str, dim: int = 256, drop: float = 0.0):
        super().__init__(key, "vector", drop)
        self.dim = dim

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2:
            raise ValueError(f"{self.key!r} must hold numbers (B,) or (B, n), got {tuple(values.shape)}")
        features = timestep_embedding(values.flatten(), self.dim)
        return zero_dropped(rearrange(features, "(b n) d -> b (n d)", b=len(values)), dropped)

    def from_text(self, text: str) -> Tensor:
        """`64,64.5` -> (2,)"""
        try:
            return torch.tensor([float(number) for number in text.split(",")])
        except ValueError as error:
            raise ValueError(f"{self.key!r} are numbers separated by commas, got {text!r}") from error


@remembers_arguments
class Features(Embedder):
    """Features that come ready-made with the batch: tokens (B, N, D), vectors (B, D), labels (B,)."""

    def __init__(self, key: str, kind: Literal["crossattn", "vector"] = "crossattn"):
        super().__init__(key, kind, 0.0)

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        values = values[:, None] if self.kind == "crossattn" and values.ndim == 2 else values
        if self.kind == "crossattn" and values.ndim != 3:
            raise ValueError(f"{self.key!r} must hold tokens (B, N, D), got {tuple(values.shape)}")
        return values
