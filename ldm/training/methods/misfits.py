"""Whether a network takes what its conditioner gives, told in the words of the config."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.conditioning import Conditioner

UNCONDITIONAL = "configs/diffusion/uncond-unet-f8.yaml"


def misfits(network: nn.Module, latent_channels: int, cond: Mapping[str, Tensor] | None) -> Iterator[str]:
    """Hold `num_classes`, `adm_in_channels`, `context_dim` and `in_channels` against one batch of conditions.

    Networks that do not have these attributes (a user's own) are not asked. Yields what the conditioner
    gives, what the network takes, and what to set.
    """
    cond = cond or {}
    if hasattr(network, "num_classes"):
        yield from _vector_misfits(network, cond.get("vector"))
    if hasattr(network, "context_dim"):
        yield from _token_misfits(network.context_dim, cond.get("crossattn"))
    maps = cond.get("concat")
    wanted = latent_channels + (0 if maps is None else maps.shape[1])
    if getattr(network, "in_channels", wanted) != wanted:
        yield (
            f"network.params.in_channels is {network.in_channels}, but the latents have {latent_channels} "
            f"channels and the conditioner's maps {wanted - latent_channels}; {_set(in_channels=wanted)}"
        )


def _vector_misfits(network: nn.Module, vector: Tensor | None) -> Iterator[str]:
    kind, width = network.num_classes, getattr(network, "adm_in_channels", None)
    has = f"network.params.num_classes is {kind}" if kind is not None else "the network takes none"
    labels = vector is not None and vector.ndim == 1 and not vector.is_floating_point()
    if vector is None:
        if kind is not None:
            unset = {"num_classes": "null"} | ({"adm_in_channels": "null"} if width is not None else {})
            yield (
                f"{has}, but the conditioner gives no class or vector; {_set(**unset)}, or take "
                f"{UNCONDITIONAL}, which is without classes"
            )
    elif labels:
        if not isinstance(kind, int) and kind not in ("continuous", "timestep"):
            unset = {"adm_in_channels": "null"} if width is not None else {}
            yield (
                f"the conditioner gives labels, but {has}; {_set(num_classes='auto', **unset)}, or embed the "
                "labels (ldm.conditioning.ClassEmbedder)"
            )
    elif vector.ndim == 2 and kind not in ("continuous", "timestep"):
        given = vector.shape[1]
        if kind != "sequential" or width != given:
            takes = f"{has} with adm_in_channels {width}" if kind == "sequential" else has
            change = {} if kind == "sequential" else {"num_classes": "sequential"}
            yield (
                f"the conditioner gives a vector of {given}, but {takes}; "
                f"{_set(**change, adm_in_channels=given)}"
            )


def _token_misfits(context_dim: Any, tokens: Tensor | None) -> Iterator[str]:
    if tokens is None:
        if context_dim is not None:
            yield (
                f"network.params.context_dim is {context_dim}, but the conditioner gives no tokens for "
                f"cross-attention; {_set(context_dim='null')}"
            )
        return
    widths = [context_dim] if context_dim is None or isinstance(context_dim, int) else list(context_dim)
    if tokens.shape[-1] not in widths:
        takes = f"network.params.context_dim is {context_dim}" if context_dim else "the network takes none"
        yield (
            f"the conditioner gives tokens of {tokens.shape[-1]} for cross-attention, but {takes}; "
            f"{_set(context_dim=tokens.shape[-1])}"
        )


def _set(**values: Any) -> str:
    return "set " + " ".join(f"network.params.{name}={value}" for name, value in values.items())


def check_conditions(conditioner: Conditioner, train: Dataset, cached: bool) -> None:
    """ValueError where the data does not hold what the conditioner reads."""
    if "label" in conditioner.keys and not train.classes:
        raise ValueError(
            "the conditioner reads labels, but the data has no classes (one subfolder a class makes them)"
        )
    for embedder in conditioner.embedders if cached else ():
        if embedder.key == "image":
            raise ValueError(
                f"the conditioner's {type(embedder).__name__} reads {embedder.key!r}, but cached latents are "
                "without the images they were made from; set cache=false, which encodes every batch anew"
            )
