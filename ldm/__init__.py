"""ldm: latent diffusion, from a folder of images to samples."""

import importlib

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "draw", "load", "sample", "save", "train"]

#: Where the public functions are; each comes on first use, so that importing ldm stays quick.
_HOMES = {
    "convert": "ldm.checkpoints.convert",
    "draw": "ldm.sampling",
    "load": "ldm.checkpoints.load",
    "sample": "ldm.sampling",
    "save": "ldm.checkpoints.save",
    "train": "ldm.training",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
