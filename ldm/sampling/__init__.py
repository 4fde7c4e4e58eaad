"""From conditions to images: the settings, `Sampling`; `sample`, latents; `draw`, images."""

from typing import Any

from ldm.sampling.section import Sampling

__all__ = ["Sampling", "draw", "sample"]


def __getattr__(name: str) -> Any:
    # On first use: those who check a config need no torch for it.
    if name == "sample":
        from ldm.sampling.latents import sample

        return sample
    if name == "draw":
        from ldm.sampling.images import draw

        return draw
    raise AttributeError(f"module 'ldm.sampling' has no attribute {name!r}")
