"""ldm: latent diffusion, from a folder of images to samples."""

__version__ = "0.1.0"
__all__ = ["__version__", "draw", "load", "sample"]


def __getattr__(name: str):
    # The public functions come on first use: importing ldm stays quick.
    if name == "load":
        from ldm.checkpoints import load

        return load
    if name == "sample":
        from ldm.sampling import sample

        return sample
    if name == "draw":
        from ldm.sampling import draw

        return draw
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
