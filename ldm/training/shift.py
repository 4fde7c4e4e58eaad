"""`shift: auto` in a config: the shift of a model's times that its latents' shape asks for."""

from typing import Any

from omegaconf import DictConfig

from ldm.diffusion.schedule import resolution_shift


def filled_shift(shift: float | str | None, latent_shape: tuple[int, int, int]) -> float | None:
    """`auto` -> `resolution_shift` of latents (C, h, w); anything else as it is."""
    return resolution_shift(*latent_shape) if shift == "auto" else shift


def fill_shift(tree: Any, latent_shape: tuple[int, int, int]) -> None:
    """Replace every `shift: auto` in a config's tree of mappings, in place."""
    if not isinstance(tree, dict | DictConfig):
        return
    for name, value in tree.items():
        if name == "shift":
            tree[name] = filled_shift(value, latent_shape)
        else:
            fill_shift(value, latent_shape)
