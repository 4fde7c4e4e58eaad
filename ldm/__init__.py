"""ldm: latent diffusion, from a folder of images to samples."""

__version__ = "0.1.0"
__all__ = ["__version__", "load", "sample"]


def __getattr__(name: str):
    # The public functions come on first use: importing ldm stays quick.
    if name == "load":
        from ldm.checkpoints import load

        return load
    if name == "sample":
        from ldm.latent_diffusion import sample

        return sample
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
