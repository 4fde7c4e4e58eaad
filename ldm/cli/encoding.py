"""Images through a first stage: reconstructions, figures, latents."""

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints import load
from ldm.cli.device import arranged, autocast, out_of_memory, pick_device
from ldm.cli.files import prepare_folder, write_png
from ldm.cli.images import Pictures, find_images, refuse_inside
from ldm.cli.progress import progress_bar
from ldm.data.images.grid import pixel_grid, to_uint8
from ldm.data.images.pixels import normalize_pixels
from ldm.files import whole_file
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage
from ldm.weights.writing import write_safetensors

GRID, FIGURES, LATENTS, RECONSTRUCTIONS = "grid.png", "figures.csv", "latents.safetensors", "reconstructions"
LATENTS_FORMAT = "ldm-latents/1"
_GRID_PAIRS, _PAIRS_A_ROW = 32, 4


class Figure(NamedTuple):
    """How far a reconstruction is from its image: PSNR in dB, mean absolute difference on the scale [-1,
    1].
    """

    path: str
    psnr: float
    l1: float


@dataclass
class Encoded:
    """What was found out. `unreadable`: path and reason of each image without a reconstruction."""

    model: str
    size: int
    figures: list[Figure] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def first_stage_of(source: Path, model: nn.Module) -> nn.Module:
    """The first stage that a loaded model is or has.

    Raises:
        ValueError: the model works on pixels, or is something else.
    """
    first_stage = model.first_stage_model if isinstance(model, LatentDiffusion) else model
    if not hasattr(first_stage, "decode_latent"):
        raise ValueError(f"{source} holds a {type(first_stage).__name__}, which is no first stage")
    if isinstance(first_stage, IdentityFirstStage):
        raise ValueError(
            f"{source} works on the pixels themselves: it has no first stage to pass images through"
        )
    return first_stage


def image_side(source: Path, model: nn.Module, first_stage: nn.Module, size: int | None) -> int:
    """The side that was asked for, else the one that the model was trained at."""
    trained = getattr(model, "description", {}).get("image_size") or getattr(model, "image_size", None)
    if size is None and (not trained or len(set(trained)) != 1):
        raise ValueError(f"{source} does not say at which size it was trained; give --size")
    size = size or trained[0]
    if size % first_stage.downsampling_factor:
        raise ValueError(
            f"--size {size} is not a multiple of the first stage's downsampling factor "
            f"{first_stage.downsampling_factor}"
        )
    return size


def png_names(paths: list[str]) -> list[str]:
    """Names of the reconstructions: the images' own as .png; `name.jpg.png` where two would be the same."""
    plain = [os.path.splitext(path)[0] + ".png" for path in paths]
    taken = Counter(name.lower() for name in plain)  # some disks do not tell cases apart
    names = [
        name if taken[name.lower()] == 1 else f"{path}.png" for path, name in zip(paths, plain, strict=True)
    ]
    return names if len(set(names)) == len(names) else [f"{path}.png" for path in paths]


def encode_images(
    source: Path,
    images: Path,
    out: Path,
    *,
    size: int | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    config: Path | None = None,
    ema: bool = True,
    latents: bool = False,
    grid: bool = True,
    device: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
) -> Encoded:
    """Reconstruct images from the mean of their posteriors and write what `ldm encode` promises into `out`.

    Raises:
        ValueError, FileNotFoundError: a wrong request, in terms of what exists.
        FileExistsError: a file is there already; nothing was computed or written.
        KeyboardInterrupt: says how many images there are.
    """
    target = pick_device(device)
    context = autocast(precision, target)
    folder, paths, unreadable = find_images(images)
    refuse_inside(out, images)
    model = load(source, config, ema=ema)
    first_stage = first_stage_of(source, model)
    size = image_side(source, model, first_stage, size)
    first_stage = arranged(first_stage.to(target), target)
    names = [f"{RECONSTRUCTIONS}/{name}" for name in png_names(paths)]
    prepare_folder(out, [*names, FIGURES, *[GRID] * grid, *[LATENTS] * latents], overwrite)
    what = f"{type(first_stage).__name__} (f{first_stage.downsampling_factor})"
    result = Encoded(what, size, unreadable=unreadable)
    pictures = Pictures(folder, paths, size, first_stage.image_channels)
    pairs: list[np.ndarray] = []
    try:
        with ExitStack() as stack:
            if latents:
                store = stack.enter_context(_latent_store(out, len(paths), first_stage, size))
            bar = stack.enter_context(progress_bar(len(paths), "encoding"))
            stack.enter_context(context)
            for indices, pixels, bad in pictures.batches(batch_size, workers):
                result.unreadable += bad
                bar.update(len(bad))
                if pixels is None:
                    continue
                originals = normalize_pixels(pixels)
                try:
                    mean, std, reconstructions = _through(first_stage, originals.to(target))
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(error, len(indices)) from error
                if latents:
                    store.add(mean, std, [paths[i] for i in indices])
                written = to_uint8(reconstructions)
                for place, index in enumerate(indices):
                    path = out / names[index]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_png(path, written[place])
                    result.figures.append(_figure(paths[index], originals[place], reconstructions[place]))
                    bar.update(1)
                if grid and len(pairs) < 2 * _GRID_PAIRS:
                    shown = to_uint8(originals)
                    pairs += [part for both in zip(shown, written, strict=True) for part in both]
            if latents and result.figures:
                store.write(
                    {"model": str(source), "weights": getattr(model, "description", {}).get("weights")}
                )
    except KeyboardInterrupt:
        done = len(result.figures)
        raise KeyboardInterrupt(
            f"stopped: {done} of {len(paths)} images are in {out}, each of them whole"
        ) from None
    _write_figures(out / FIGURES, result.figures)
    if pairs:
        with whole_file(out / GRID) as file:
            pixel_grid(np.stack(pairs[: 2 * _GRID_PAIRS]), min(2 * _PAIRS_A_ROW, len(pairs))).save(
                file, "png"
            )
    return result


@torch.no_grad()
def _through(first_stage: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean and std, and the reconstruction from the mean, float32 on the CPU."""
    mean, std = first_stage.moments(images)
    reconstruction = first_stage.decode_latent(mean)
    if not reconstruction.isfinite().all():
        raise ValueError(
            "the reconstructions are not finite: the model diverged in training, or needs --precision 32"
        )
    return mean.float().cpu(), std.float().cpu(), reconstruction.float().clamp(-1, 1).cpu()


def _figure(path: str, image: Tensor, reconstruction: Tensor) -> Figure:
    difference = (reconstruction - image).double()
    # A range of 2 between black and white: PSNR = 10 log10(4 / MSE).
    psnr = 10 * math.log10(4 / max(difference.square().mean().item(), 1e-10))
    return Figure(path, psnr, difference.abs().mean().item())


def _write_figures(path: Path, figures: Iterable[Figure]) -> None:
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(Figure._fields)
        table.writerows((path, f"{psnr:.4f}", f"{l1:.6f}") for path, psnr, l1 in figures)
        text.flush()
        text.detach()


class _LatentStore:
    """Means and deviations on their way to one file: they wait on the disk, not in memory."""

    def __init__(self, folder: Path, count: int, shape: tuple[int, ...]):
        self.folder, self.paths = folder, []
        self.files = {name: folder / f".{LATENTS}.{name}.partial" for name in ("mean", "std")}
        self.arrays = {
            name: np.memmap(file, np.float32, "w+", shape=(count, *shape))
            for name, file in self.files.items()
        }

    def add(self, mean: Tensor, std: Tensor, paths: list[str]) -> None:
        rows = slice(len(self.paths), len(self.paths) + len(paths))
        self.arrays["mean"][rows], self.arrays["std"][rows] = mean.numpy(), std.numpy()
        self.paths += paths

    def write(self, origin: dict) -> None:
        tensors = {name: torch.from_numpy(array[: len(self.paths)]) for name, array in self.arrays.items()}
        facts = {"format": LATENTS_FORMAT, **{k: v for k, v in origin.items() if v is not None}}
        write_safetensors(self.folder / LATENTS, tensors, {**facts, "paths": json.dumps(self.paths)})


@contextmanager
def _latent_store(out: Path, count: int, first_stage: nn.Module, size: int) -> Iterator[_LatentStore]:
    side = size // first_stage.downsampling_factor
    store = _LatentStore(out, count, (first_stage.latent_channels, side, side))
    try:
        yield store
    finally:
        store.arrays.clear()
        for file in store.files.values():
            file.unlink(missing_ok=True)
