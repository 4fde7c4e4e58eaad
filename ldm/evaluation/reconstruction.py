"""Images through a first stage: reconstructions, how far they are off, latents."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.images.given import Pictures
from ldm.data.images.pixels import normalize_pixels
from ldm.files import whole_file
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage
from ldm.sampling.images import held_in_memory
from ldm.weights.writing import write_safetensors

LATENTS_FORMAT = "ldm-latents/1"


class Figure(NamedTuple):
    """How far a reconstruction is from its image: PSNR in dB, mean absolute difference in [-1, 1]."""

    path: str
    psnr: float
    l1: float


class Reconstructed(NamedTuple):
    """Some images and what became of them, float32 on the CPU.

    indices: the images' places in the `Pictures`. images, reconstructions: (B, C, H, W) in [-1, 1].
    mean, std: the posteriors', (B, c, h, w).
    """

    indices: list[int]
    images: Tensor
    reconstructions: Tensor
    mean: Tensor
    std: Tensor
    figures: list[Figure]


def first_stage_of(model: nn.Module, name: str) -> nn.Module:
    """The first stage that a loaded model is or has; `name` is the model's, for messages.

    Raises:
        ValueError: the model works on pixels, or is something else.
    """
    first_stage = model.first_stage_model if isinstance(model, LatentDiffusion) else model
    if not hasattr(first_stage, "decode_latent"):
        raise ValueError(f"{name} holds a {type(first_stage).__name__}, which is no first stage")
    if isinstance(first_stage, IdentityFirstStage):
        raise ValueError(f"{name} works on the pixels themselves and has no first stage")
    return first_stage


def image_side(model: nn.Module, size: int | None, name: str) -> int:
    """The side of the images that a model's first stage takes: `size`, else the one that it was trained at.

    Raises:
        ValueError: it does not say, or the size is no multiple of the downsampling factor.
    """
    trained = getattr(model, "description", {}).get("image_size") or getattr(model, "image_size", None) or ()
    if size is None and len(set(trained)) != 1:
        raise ValueError(f"{name} does not say at which size it was trained; give a size")
    size, factor = size or trained[0], first_stage_of(model, name).downsampling_factor
    if size % factor:
        raise ValueError(f"size {size} is not a multiple of the first stage's downsampling factor {factor}")
    return size


@torch.no_grad()
def reconstruct(
    first_stage: nn.Module, pictures: Pictures, batch_size: int = 16, workers: int | None = None
) -> Iterator[Reconstructed]:
    """Reconstruct images from the mean of their posteriors, on the first stage's device.

    Args:
        pictures: of `image_side` and `image_channels`; its `unreadable` then holds what was left out.
        workers: processes that read, None for what suits their number.

    Raises:
        ValueError: the reconstructions are not finite, or the memory holds no such batch.
    """
    device = next(first_stage.parameters()).device
    for indices, pixels in pictures.batches(batch_size, workers):
        images = normalize_pixels(pixels)
        with held_in_memory(len(indices)):
            mean, std = first_stage.moments(images.to(device))
            decoded = first_stage.decode_latent(mean)
        if not decoded.isfinite().all():
            raise ValueError("the reconstructions are not finite: the model diverged, or needs float32")
        decoded = decoded.float().clamp(-1, 1).cpu()
        pairs = zip(indices, images, decoded, strict=True)
        figures = [_figure(pictures.paths[i], image, other) for i, image, other in pairs]
        yield Reconstructed(indices, images, decoded, mean.float().cpu(), std.float().cpu(), figures)


def _figure(path: str, image: Tensor, reconstruction: Tensor) -> Figure:
    difference = (reconstruction - image).double()
    # A range of 2 between black and white: PSNR = 10 log10(4 / MSE).
    psnr = 10 * math.log10(4 / max(difference.square().mean().item(), 1e-10))
    return Figure(path, psnr, difference.abs().mean().item())


def write_figures(path: Path, figures: Iterable[Figure]) -> None:
    """A table with the columns path, psnr and l1."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(Figure._fields)
    table.writerows((name, f"{psnr:.4f}", f"{l1:.6f}") for name, psnr, l1 in figures)
    with whole_file(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


@contextmanager
def latents_file(
    path: Path, count: int, origin: Mapping[str, str | None]
) -> Iterator[Callable[[Reconstructed], None]]:
    """A .safetensors file of what the given function is handed, written when the block ends well.

    `mean` and `std`, float32 (N, c, h, w) with N at most `count`, wait on the disk. The metadata are `origin`
    and the images' `paths`, as JSON. No images make no file.
    """
    arrays, paths = {}, []
    files = {name: path.with_name(f".{path.name}.{name}.partial") for name in ("mean", "std")}

    def add(group: Reconstructed) -> None:
        rows = slice(len(paths), len(paths) + len(group.indices))
        for name, file in files.items():
            values = getattr(group, name).numpy()
            if name not in arrays:
                arrays[name] = np.memmap(file, np.float32, "w+", shape=(count, *values.shape[1:]))
            arrays[name][rows] = values
        paths.extend(figure.path for figure in group.figures)

    try:
        yield add
        if paths:
            tensors = {name: torch.from_numpy(array[: len(paths)]) for name, array in arrays.items()}
            facts = {"format": LATENTS_FORMAT, **origin, "paths": json.dumps(paths)}
            write_safetensors(path, tensors, {name: fact for name, fact in facts.items() if fact is not None})
    finally:
        arrays.clear()
        for file in files.values():
            file.unlink(missing_ok=True)
