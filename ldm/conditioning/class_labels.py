"""Class labels as conditions."""

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning.conditioner import Embedder


class _ClassCondition(Embedder):
    """Labels 0..num_classes-1; the absent class is the extra label `num_classes`."""

    kinds = ("crossattn", "vector")

    def __init__(self, key: str, kind: str, drop: float, num_classes: int, null_class: bool = True):
        super().__init__(key, kind, drop)
        name = type(self).__name__
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"{name}: num_classes must be a positive integer, got {num_classes!r}")
        if drop > 0 and not null_class:
            raise ValueError(f"{name}: drop > 0 needs null_class=True")
        self.num_classes, self.null_class = num_classes, null_class

    def _labels(self, labels: Tensor, dropped: Tensor | None) -> Tensor:
        if dropped is None:
            return labels
        if not self.null_class:
            raise self.no_null_values()
        return torch.where(dropped, self.num_classes, labels)

    def null_values(self, batch_size: int, device: torch.device) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.long, device=device)


@remembers_arguments
class ClassEmbedder(_ClassCondition):
    """Class label -> learned embedding, as one cross-attention token (B, 1, D) or as a vector (B, D).

    The parameter is `embedding.weight` as in the original LDM's ClassEmbedder, with one more row, the last,
    for the absent class unless `null_class=False`. As a `vector` it is added to the timestep embedding by a
    UNet with `num_classes="sequential"` and `adm_in_channels=dim`. Labels out of range raise IndexError.
    """

    def __init__(
        self,
        num_classes: int | Literal["auto"],
        dim: int,
        kind: Literal["crossattn", "vector"] = "crossattn",
        drop: float = 0.1,
        key: str = "label",
        null_class: bool = True,
    ):
        super().__init__(key, kind, drop, num_classes, null_class)
        self.embedding = nn.Embedding(num_classes + int(null_class), dim)

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        rows = self.embedding(self._labels(values, dropped))
        return rows[:, None] if self.kind == "crossattn" else rows


@remembers_arguments
class ClassLabel(_ClassCondition):
    """Class label passed through as integers (B,) for a network that embeds them itself.

    The network adds them to its timestep embedding: a `UNetModel(num_classes=K + 1)`, or a
    `DiT(num_classes=K)`, whose table has one row more by itself; the absent class is label K. A network whose
    table is too small is refused when the model is built (ValueError).
    """

    def __init__(self, num_classes: int | Literal["auto"], drop: float = 0.1, key: str = "label"):
        super().__init__(key, "vector", drop, num_classes)

    def attach(self, model: nn.Module) -> None:
        rows = _table_rows(model.network)
        needed = self.num_classes + (self.drop > 0)
        if rows is not None and rows < needed:
            absent = f" and the absent class, label {self.num_classes}" if self.drop > 0 else ""
            raise ValueError(
                f"the network embeds {rows} labels, but ClassLabel gives {self.num_classes} classes{absent}: "
                f"it needs num_classes={self.num_classes + 1} (DiT: num_classes={self.num_classes}) or auto"
            )

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        return self._labels(values, dropped)


def _table_rows(network: nn.Module) -> int | None:
    """How many labels a network's own table holds, the absent class included; None where it has no table."""
    table = getattr(network, "label_emb", None)  # UNetModel
    if table is None:
        table = getattr(getattr(network, "y_embedder", None), "embedding_table", None)  # DiT
    return table.num_embeddings if isinstance(table, nn.Embedding) else None
