"""The contract of conditioning: a list of embedders, each reading one key of the batch."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.wording import check_choice

KINDS = ("crossattn", "vector", "concat")


def zero_dropped(values: Tensor, dropped: Tensor | None) -> Tensor:
    """`values` (B, ...) with zeros for the samples that `dropped` (B,) marks; None marks none."""
    if dropped is None:
        return values
    dropped = dropped.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(dropped, torch.zeros_like(values), values)


class Embedder(nn.Module):
    """One condition: reads `batch[key]`, returns one tensor of its kind (or a dict with one tensor a kind).

    Kinds (names of the original LDM and of sgm): `crossattn` (B, N, D) tokens, `vector` (B, D) features or
    (B,) integer labels, `concat` (B, C, H, W) maps beside the noisy latent.

    A subclass implements `embed(values, dropped)`, and `null_values(batch_size)` if the absence of the
    condition can be expressed; `drop` is the probability with which training replaces the condition by its
    absence, which is what classifier-free guidance needs (Ho & Salimans, 2022, sec. 3).

    `also` are other names under which a batch may hold the key, `kinds` those that the class can be of.
    """

    also: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS

    def __init__(self, key: str, kind: Literal["crossattn", "vector", "concat"], drop: float = 0.0):
        super().__init__()
        check_choice(f"{type(self).__name__}: kind", kind, self.kinds)
        if not 0.0 <= drop <= 1.0:
            raise ValueError(f"{type(self).__name__}: drop must be a probability in [0, 1], got {drop}")
        self.key, self.kind, self.drop = key, kind, drop

    def embed(self, values, dropped: Tensor | None) -> Tensor | dict[str, Tensor]:
        """`values` = `batch[key]`; `dropped` (B,) bool marks samples whose condition is absent, None none."""
        raise NotImplementedError

    def null_values(self, batch_size: int, device: torch.device):
        """Stand-in values for a batch without this condition (all of them are then marked as dropped).

        Raises:
            ValueError: nothing stands for its absence.
        """
        raise self.no_null_values()

    def no_null_values(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__}: nothing stands for no {self.key!r}: give an explicit `uncond`, such as "
            "conditioner.without(batch, keys)"
        )

    def from_text(self, text: str):
        """The value of one sample, such as `sample.py --condition KEY=TEXT` gives it: a tensor without the
        batch's dimension, or anything of which the batch holds a list.

        Raises:
            ValueError: this text, or any, makes no such value.
        """
        raise ValueError(f"what a {type(self).__name__} reads cannot be given as text")

    def attach(self, model: nn.Module) -> None:
        """Called by the `LatentDiffusion` that this becomes a part of; for embedders that need it."""

    def values_in(self, batch: dict):
        """What the batch holds for this embedder; ValueError with what it does hold, if that is nothing."""
        for name in (self.key, *self.also):
            if name in batch:
                return batch[name]
        hint = "; does the data set have classes?" if self.key == "label" else ""
        raise ValueError(
            f"{type(self).__name__} reads the key {self.key!r}, but the batch has only "
            f"{', '.join(sorted(batch)) or 'nothing'}{hint}"
        )


@remembers_arguments
class Conditioner(nn.Module):
    """Runs the embedders and merges their outputs by kind into `{kind: tensor}`.

    `crossattn` outputs are joined along the tokens (`crossattn_merge="tokens"`) or along the channels
    (`"channels"`, as SDXL does with its two text encoders); `vector` and `concat` outputs along the channels.
    """

    def __init__(
        self, embedders: list | None = None, crossattn_merge: Literal["tokens", "channels"] = "tokens"
    ):
        super().__init__()
        for embedder in embedders or []:
            if not isinstance(embedder, Embedder):
                raise ValueError(f"embedders must be Embedder modules, got {type(embedder).__name__}")
        self.embedders = nn.ModuleList(embedders or [])
        check_choice("crossattn_merge", crossattn_merge, ("tokens", "channels"))
        self._merge_dim = {"crossattn": 1 if crossattn_merge == "tokens" else 2, "vector": 1, "concat": 1}

    @property
    def keys(self) -> list[str]:
        """Batch keys that the embedders read."""
        return [embedder.key for embedder in self.embedders]

    @property
    def drops(self) -> bool:
        """Whether training ever drops a condition, without which guidance has nothing to lean on."""
        return any(embedder.drop > 0 for embedder in self.embedders)

    def forward(self, batch: dict, u: Tensor | None = None) -> dict[str, Tensor]:
        """Embed a batch.

        Args:
            batch: holds every embedder's key.
            u: numbers in (0, 1) of shape (number of embedders, B); an embedder's sample is dropped where
                `u < drop`. None drops nothing.

        Raises:
            ValueError: the batch lacks a key (it says which keys it has), `u` has another shape, or outputs
                of one kind do not join.
        """
        outputs = []
        for i, embedder in enumerate(self.embedders):
            values = embedder.values_in(batch)
            if u is not None and u.shape != (len(self.embedders), len(values)):
                expected = f"({len(self.embedders)} embedders, {len(values)} samples)"
                raise ValueError(f"u must be {expected}, got {tuple(u.shape)}")
            dropped = u[i] < embedder.drop if u is not None and embedder.drop > 0 else None
            outputs.append(embedder.embed(values, dropped))
        return self._merge(outputs)

    def unconditional(self, batch_size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The conditions of a batch from which everything was dropped."""
        device = torch.device(device)
        everything = torch.ones(batch_size, dtype=torch.bool, device=device)
        return self._merge([e.embed(e.null_values(batch_size, device), everything) for e in self.embedders])

    def without(self, batch: dict, keys: Collection[str]) -> dict[str, Tensor]:
        """The conditions of a batch from which `keys` alone were dropped: the unconditional side of a
        guidance that keeps the rest, such as SDXL's sizes or the map of an inpainting model. ValueError where
        no embedder reads one of the keys.
        """
        for key in sorted(keys):
            check_choice("key", key, self.keys)
        outputs = []
        for embedder in self.embedders:
            values = embedder.values_in(batch)
            dropped = torch.ones(len(values), dtype=torch.bool) if embedder.key in keys else None
            if dropped is not None and isinstance(values, Tensor):
                dropped = dropped.to(values.device)
            outputs.append(embedder.embed(values, dropped))
        return self._merge(outputs)

    def _merge(self, outputs: list[Tensor | dict[str, Tensor]]) -> dict[str, Tensor]:
        pairs: dict[str, list[tuple[str, Tensor]]] = {}
        for embedder, output in zip(self.embedders, outputs, strict=True):
            for kind, tensor in (output if isinstance(output, dict) else {embedder.kind: output}).items():
                pairs.setdefault(kind, []).append((embedder.key, tensor))
        return {
            kind: self._joined(kind, *zip(*found, strict=True)) if len(found) > 1 else found[0][1]
            for kind, found in pairs.items()
        }

    def _joined(self, kind: str, keys: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Tensor:
        if any(not t.is_floating_point() for t in tensors):
            raise ValueError(f"integer labels do not join with other {kind!r} conditions ({', '.join(keys)})")
        try:
            return torch.cat(tensors, self._merge_dim[kind])
        except RuntimeError as error:
            shapes = ", ".join(f"{key} {tuple(t.shape)}" for key, t in zip(keys, tensors, strict=True))
            axis = self._merge_dim[kind]
            raise ValueError(f"the {kind!r} conditions do not join along axis {axis}: {shapes}") from error
