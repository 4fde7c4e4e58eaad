"""From conditions to images: the settings, `Sampling`; `sample`, latents; `draw`, images."""

from importlib import import_module
from typing import Any

from ldm.sampling.section import Sampling

__all__ = ["Sampling", "draw", "sample"]
_PLACES = {"sample": "ldm.sampling.latents", "draw": "ldm.sampling.images"}


def __getattr__(name: str) -> Any:
    # On first use: those who check a config need no torch for it.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'ldm.sampling' has no attribute {name!r}")
