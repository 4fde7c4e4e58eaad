"""What `sample` and `encode` leave in a folder: images, sheets, figures, archives."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ldm import __version__
from ldm.cli.machine import lasting_interruption, progress_bar
from ldm.cli.output import npz_file, prepare_folder, write_image, write_png
from ldm.cli.wanted import Wanted
from ldm.data.images.given import Pictures
from ldm.data.images.grid import led_rows, pixel_grid, to_uint8
from ldm.evaluation.reconstruction import Figure, Reconstructed, latents_file, write_figures
from ldm.files import CannotWrite
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling import Sampling

log = logging.getLogger(__name__)

GRID, NPZ = "grid.png", "samples.npz"
FIGURES, LATENTS, RECONSTRUCTIONS = "figures.csv", "latents.safetensors", "reconstructions"
_GRID_MOST = 400  # drawn images on one sheet, and
_GRID_PIXELS = 2**26  # its pixels
_ROW_MOST = 20  # images of one class, or one image, that stand in one row
_GRID_PAIRS, _PAIRS_A_ROW = 32, 4


def settle(model: nn.Module, name: str, asked: dict[str, Any]) -> Sampling:
    """How the model is to be sampled, held against it before anything is made.

    Raises:
        ValueError: no diffusion model, what the sampler refuses, or guidance with nothing to guide by.
    """
    if not isinstance(model, LatentDiffusion):
        what = "a first stage" if hasattr(model, "decode_latent") else "a part of a model"
        raise ValueError(
            f"{name} holds {what} ({type(model).__name__}), which draws nothing; give the run folder of a "
            "diffusion model (`ldm encode` passes images through a first stage)"
        )
    settings = Sampling.of(model, **asked)
    if settings.guidance != 1.0 and not model.conditioner.keys:
        raise ValueError("--guidance needs a conditional model; this one has nothing to guide towards")
    # Published models do not say what their training dropped.
    own = getattr(model, "description", {}).get("sampling") or {}
    if settings.guidance != 1.0 and "guidance" in own and not model.conditioner.drops:
        raise ValueError(
            f"guidance {settings.guidance:g} needs a model that was trained without its condition part of "
            "the time, and this one was not (drop is 0 in its conditioner); say --guidance 1"
        )
    return settings


def facts_of(model: LatentDiffusion, source: Path, seed: int, settings: Sampling) -> dict[str, Any]:
    """What is needed to draw an image again, besides what it is conditioned on."""
    description = getattr(model, "description", {})
    origin = {"model": str(source), "weights": description.get("weights"), "step": description.get("step")}
    known = {name: value for name, value in origin.items() if value is not None}
    return {"seed": seed, **settings.facts(), **known, "ldm": __version__}


def write_drawn(
    out: Path,
    batches: Iterable[Tensor],
    wanted: Wanted,
    facts: Mapping[str, Any],
    *,
    grid: bool,
    npz: bool,
    overwrite: bool,
) -> str:
    """Write images as soon as they are drawn, `00000-<image>-<class>.png` ..., `grid.png`, `samples.npz`.

    Files appear whole or not at all. Returns what was written, in words.

    Raises:
        FileExistsError: a file is there already; nothing was drawn or written.
        KeyboardInterrupt: says how many images there are.
    """
    count, names = wanted.count, wanted.file_names()
    prepare_folder(out, [*names, *[GRID] * grid, *[NPZ] * npz], overwrite)
    _warn_of_others(out, names)
    sheet: list[np.ndarray] = []
    done = 0
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(npz_file(out / NPZ, count, wanted.labels)) if npz else None
            bar = stack.enter_context(progress_bar(count, "sampling"))
            interrupted = stack.enter_context(lasting_interruption())
            for images in batches:
                pixels = to_uint8(images)
                if archive is not None:
                    archive(pixels)
                for picture in pixels:
                    write_png(out / names[done], picture, {"index": done, **wanted.facts(done), **facts})
                    done += 1
                    bar.update(1)
                    interrupted()
                if grid:
                    sheet += list(pixels[: _room_on_sheet(pixels, wanted) - len(sheet)])
        if grid:
            write_image(out / GRID, _arranged(wanted, np.stack(sheet)))
    except KeyboardInterrupt:
        # It may have come between the appearance of an image and its count.
        done += done < count and not overwrite and (out / names[done]).exists()
        raise KeyboardInterrupt(f"stopped: {_whole(done, count, out)}") from None
    except CannotWrite as error:
        again = ". --overwrite replaces them" if done else ""
        raise CannotWrite(
            f"{error}, and give the same command again. {_whole(done, count, out)}{again}"
        ) from error
    shown = "all" if len(sheet) == count else f"the first {len(sheet)}"
    said = f"{count} images in {out}" + (f", {shown} on one sheet: {out / GRID}" if grid else "")
    return said if count > 1 else f"1 image: {out / names[0]}"


def _whole(done: int, count: int, out: Path) -> str:
    return f"{done} of {count} images are in {out}, each of them whole"


def _arranged(wanted: Wanted, pixels: np.ndarray) -> Image.Image:
    """The sheet: a row a class, or an image in front of its row, where that is how they were asked for."""
    columns = wanted.each if wanted.each <= _ROW_MOST else None
    if wanted.pictures is not None and columns is not None:
        leads = wanted.batch(range(0, len(pixels), columns))["image"]
        return led_rows(to_uint8(leads), pixels, columns)
    return pixel_grid(pixels, columns if wanted.by_class else None)


def _room_on_sheet(pixels: np.ndarray, wanted: Wanted) -> int:
    """How many images of this size, (B, H, W) or (B, H, W, C), one sheet holds, besides those in front of
    their rows."""
    room = min(_GRID_MOST, max(1, _GRID_PIXELS // (pixels.shape[1] * pixels.shape[2])))
    return room if wanted.pictures is None else max(1, room * wanted.each // (wanted.each + 1))


def _warn_of_others(out: Path, names: list[str]) -> None:
    """Somebody who counts or measures the folder should know of images that this command does not replace."""
    here = {path.name for path in out.iterdir() if re.fullmatch(r"[0-9]{5,}(-.*)?\.png", path.name)}
    if others := sorted(here.difference(names)):
        said = "note: %s also holds %d images of another request, such as %s"
        log.warning(said, out, len(others), others[0])


def png_names(paths: list[str]) -> list[str]:
    """Names of the reconstructions: the images' own as .png; `name.jpg.png` where two would be the same."""
    plain = [os.path.splitext(path)[0] + ".png" for path in paths]
    taken = Counter(name.lower() for name in plain)  # some disks do not tell cases apart
    both = zip(paths, plain, strict=True)
    names = [name if taken[name.lower()] == 1 else f"{path}.png" for path, name in both]
    return names if len(set(names)) == len(names) else [f"{path}.png" for path in paths]


def write_reconstructed(
    out: Path,
    groups: Iterable[Reconstructed],
    pictures: Pictures,
    origin: Mapping[str, str | None],
    *,
    latents: bool,
    grid: bool,
    overwrite: bool,
) -> list[Figure]:
    """Write reconstructions as they are made, `figures.csv`, `latents.safetensors`, `grid.png`; see
    `write_drawn`. Returns how far off each reconstruction is."""
    names = [f"{RECONSTRUCTIONS}/{name}" for name in png_names(pictures.paths)]
    prepare_folder(out, [*names, FIGURES, *[GRID] * grid, *[LATENTS] * latents], overwrite)
    figures: list[Figure] = []
    pairs: list[np.ndarray] = []
    try:
        with ExitStack() as stack:
            keep = None
            if latents:
                keep = stack.enter_context(latents_file(out / LATENTS, len(pictures), origin))
            bar = stack.enter_context(progress_bar(len(pictures), "encoding"))
            for group in groups:
                if keep is not None:
                    keep(group)
                written = to_uint8(group.reconstructions)
                for index, pixels, figure in zip(group.indices, written, group.figures, strict=True):
                    path = out / names[index]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_png(path, pixels)
                    figures.append(figure)
                    bar.update(1)
                if grid and len(pairs) < 2 * _GRID_PAIRS:
                    both = zip(to_uint8(group.images), written, strict=True)
                    pairs += [part for pair in both for part in pair]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: {_whole(len(figures), len(pictures), out)}") from None
    write_figures(out / FIGURES, figures)
    if pairs:
        pixels = np.stack(pairs[: 2 * _GRID_PAIRS])
        write_image(out / GRID, pixel_grid(pixels, min(2 * _PAIRS_A_ROW, len(pixels))))
    return figures
