"""From a request to files: which settings, in which groups, PNGs."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import __version__
from ldm.checkpoints import load
from ldm.cli.conditions import Wanted, choose
from ldm.cli.device import arranged, autocast, out_of_memory, pick_device
from ldm.cli.files import NpzWriter, prepare_folder, write_png
from ldm.cli.images import refuse_inside
from ldm.cli.interruption import lasting_interruption
from ldm.cli.progress import progress_bar
from ldm.data.images.grid import led_rows, pixel_grid, to_uint8
from ldm.diffusion.samplers import SAMPLERS
from ldm.files import CannotWrite, whole_file
from ldm.latent_diffusion import LatentDiffusion, sample, sampling_sigmas

log = logging.getLogger(__name__)

GRID, NPZ = "grid.png", "samples.npz"
_GRID_MOST = 400  # images on one sheet, and
_GRID_PIXELS = 2**26  # its pixels
_ROW_MOST = 20  # images of one class, or one image, that stand in one row
_DEFAULTS = {"sampler": "euler", "steps": 30, "guidance": 1.0, "spacing": None, "eta": None, "shift": None}
# What a group of images may cost the network, in parameters times positions of the latent (about as many
# multiplications), and how many there are at most: enough to keep small networks busy, one image for large
# ones.
_GROUP_COST, _GROUP_MOST = 4e9, 16


@dataclass(frozen=True)
class SampleRequest:
    """What the user asked for; None leaves a setting to the model."""

    n: int = 16
    classes: str | None = None
    image: Path | None = None
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    spacing: str | None = None
    shift: float | None = None
    batch_size: int = 64
    exact: bool | None = None

    def settings(self, model: LatentDiffusion) -> dict:
        """Keyword arguments of `sample`: the request's, else the model's, else the toolkit's.

        Raises:
            ValueError: what the sampler or the schedule refuses, or guidance with nothing to guide by.
        """
        own = dict(getattr(model, "description", {}).get("sampling") or {})
        unknown = sorted(own.keys() - _DEFAULTS.keys())
        if unknown:
            raise ValueError(f"the model's own sampling settings have unknown keys: {', '.join(unknown)}")
        chosen = _DEFAULTS | own
        if self.sampler not in (None, chosen["sampler"]):
            chosen |= {"eta": None, "spacing": None}  # belonged to the model's own sampler
        asked = {name: getattr(self, name) for name in _DEFAULTS}
        chosen |= {name: value for name, value in asked.items() if value is not None}
        if chosen["sampler"] not in SAMPLERS:
            raise ValueError(f"sampler {chosen['sampler']!r} is unknown; there are {', '.join(SAMPLERS)}")
        if not model.conditioner.keys:
            if self.guidance not in (None, 1.0):
                raise ValueError(
                    "--guidance needs a conditional model; this one has nothing to guide towards"
                )
            chosen["guidance"] = 1.0
        elif chosen["guidance"] != 1.0 and not model.conditioner.drops:
            raise ValueError(
                f"guidance {chosen['guidance']:g} needs a model that was trained without its condition part "
                "of the time, and this one was not (drop is 0 in its conditioner); say --guidance 1"
            )
        if not math.isfinite(chosen["guidance"]):
            raise ValueError(f"--guidance {chosen['guidance']} is no finite number")
        _check_eta(chosen["sampler"], chosen["eta"])
        sampling_sigmas(
            model.denoiser, **{name: chosen[name] for name in ("steps", "spacing", "sampler", "shift")}
        )
        return chosen


def _check_eta(sampler: str, eta: float | None) -> None:
    if eta is not None and sampler != "ddim":
        raise ValueError(f"--eta belongs to the ddim sampler, not to {sampler}")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta:g} must be from 0 to 1")


@dataclass(frozen=True)
class Written:
    """What is in the folder now; `on_sheet` is "all" or how many the grid shows, `unreadable` how many images
    nothing was drawn of."""

    count: int
    files: list[Path]
    on_sheet: str
    unreadable: int = 0


def group_size(model: LatentDiffusion) -> int:
    """How many images are computed together where the same bits are wanted whatever the batch size.

    Kernels round differently for different batch shapes, so the shape has to be fixed, by the model alone.
    """
    cost = sum(p.numel() for p in model.network.parameters()) * math.prod(model.latent_shape[1:])
    most = min(_GROUP_MOST, max(1.0, _GROUP_COST / max(cost, 1)))
    return 2 ** int(math.log2(most))


def draw(model: LatentDiffusion, request: SampleRequest, wanted: Wanted) -> Iterator[Tensor]:
    """Batches of images (B, C, H, W), about in [-1, 1], on the CPU, in order.

    An exact request is computed in groups of `group_size`, the last one filled up with images that are thrown
    away: image i then always has place i mod G in a batch of G, and goes through the same arithmetic.
    """
    settings = request.settings(model)
    count = wanted.count
    exact = model.device.type == "cpu" if request.exact is None else request.exact
    size = group_size(model) if exact else request.batch_size
    for start in range(0, count, size):
        kept = min(size, count - start)
        computed = size if exact else kept
        batch = wanted.batch([min(start + i, count - 1) for i in range(computed)], model.device)
        try:
            with torch.no_grad():
                cond = model.conditioner(batch) if batch else None
            z = sample(model, computed, cond, seed=request.seed, first_index=start, **settings)
            images = model.to_image(z)[:kept].float().cpu()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, computed) from error
        if not images.isfinite().all():
            raise ValueError(
                f"images {start} to {start + kept - 1} are not finite: the model diverged in training, "
                "or needs --precision 32"
            )
        yield images


def write_samples(
    source: Path,
    request: SampleRequest,
    out: Path,
    *,
    config: Path | None = None,
    ema: bool = True,
    grid: bool = True,
    npz: bool = False,
    device: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
) -> Written:
    """Load the model, draw, and write `00000-<image>-<class>.png` ..., `grid.png`, `samples.npz` into `out`.

    Files appear whole or not at all, each image as soon as it is drawn.

    Raises:
        ValueError, FileNotFoundError: a wrong request, in terms of what exists.
        FileExistsError: a file is there already; nothing was drawn or written.
        KeyboardInterrupt: says how many images there are.
    """
    target = pick_device(device)
    context = autocast(precision, target)
    model = load(source, config, ema=ema, device=target)
    if not isinstance(model, LatentDiffusion):
        what = "a first stage" if hasattr(model, "decode_latent") else "a part of a model"
        raise ValueError(
            f"{source} holds {what} ({type(model).__name__}), which draws nothing; give the run folder of a "
            "diffusion model (`ldm encode` passes images through a first stage)"
        )
    model = arranged(model, target)
    if request.image is not None:
        refuse_inside(out, request.image)
    wanted = choose(model, request.n, request.classes, request.image)
    settings = request.settings(model)
    count, names = wanted.count, wanted.file_names()
    prepare_folder(out, [*names, *[GRID] * grid, *[NPZ] * npz], overwrite)
    _warn_of_others(out, names)
    facts = _facts(model, source, request.seed, settings)
    sheet: list[np.ndarray] = []
    done = 0
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(NpzWriter.at(out / NPZ, count)) if npz else None
            bar = stack.enter_context(progress_bar(count, "sampling"))
            interrupted = stack.enter_context(lasting_interruption())
            stack.enter_context(context)
            for images in draw(model, request, wanted):
                pixels = to_uint8(images)
                if archive is not None:
                    archive.add(pixels)
                for picture in pixels:
                    write_png(out / names[done], picture, {"index": done, **wanted.facts(done), **facts})
                    done += 1
                    bar.update(1)
                    interrupted()
                if grid:
                    sheet += list(pixels[: _room_on_sheet(pixels, wanted, request.n) - len(sheet)])
            if archive is not None:
                archive.finish(wanted.labels)
        if grid:
            with whole_file(out / GRID) as file:
                _arranged(request, wanted, np.stack(sheet)).save(file, "png")
    except KeyboardInterrupt:
        # It may have come between the appearance of an image and its count.
        done += done < count and not overwrite and (out / names[done]).exists()
        raise KeyboardInterrupt(
            f"stopped: {done} of {count} images are in {out}, each of them whole"
        ) from None
    except CannotWrite as error:
        again = ". --overwrite replaces them" if done else ""
        raise CannotWrite(
            f"{error}, and give the same command again. {done} of {count} images are in {out}, each of them "
            f"whole{again}"
        ) from error
    on_sheet = "all" if len(sheet) == count else f"the first {len(sheet)}"
    return Written(count, [out / name for name in names], on_sheet, len(wanted.unreadable))


def _arranged(request: SampleRequest, wanted: Wanted, pixels: np.ndarray) -> Image.Image:
    """The sheet: a row a class, or an image in front of its row, where that is how they were asked for."""
    columns = request.n if request.n <= _ROW_MOST else None
    if wanted.pictures is not None and columns is not None:
        leads = wanted.images(range(0, len(pixels), columns))
        return led_rows(to_uint8(leads), pixels, columns)
    return pixel_grid(pixels, columns if request.classes is not None else None)


def _room_on_sheet(pixels: np.ndarray, wanted: Wanted, row: int) -> int:
    """How many images of this size, (B, H, W) or (B, H, W, C), one sheet holds, besides those in front of
    their rows."""
    room = min(_GRID_MOST, max(1, _GRID_PIXELS // (pixels.shape[1] * pixels.shape[2])))
    return room if wanted.pictures is None else max(1, room * row // (row + 1))


def _warn_of_others(out: Path, names: list[str]) -> None:
    """Somebody who counts or measures the folder should know of images that this command does not replace."""
    here = {path.name for path in out.iterdir() if re.fullmatch(r"[0-9]{5,}(-.*)?\.png", path.name)}
    others = sorted(here.difference(names))
    if others:
        log.warning(
            "note: %s also holds %d images of another request, such as %s", out, len(others), others[0]
        )


def _facts(model: LatentDiffusion, source: Path, seed: int, settings: dict) -> dict:
    """What is needed to draw an image again."""
    description = getattr(model, "description", {})
    origin = {"model": str(source), "weights": description.get("weights"), "step": description.get("step")}
    facts = {"seed": seed, **settings, **origin, "ldm": __version__}
    return {name: value for name, value in facts.items() if value is not None}
