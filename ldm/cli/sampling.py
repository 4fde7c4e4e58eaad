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
from torch import Tensor

from ldm import __version__
from ldm.checkpoints import load
from ldm.cli.classes import choose_labels, class_names, safe_name
from ldm.cli.device import arranged, autocast, out_of_memory, pick_device
from ldm.cli.files import NpzWriter, prepare_folder, whole_file, write_png
from ldm.cli.progress import progress_bar
from ldm.data.grid import pixel_grid, to_uint8
from ldm.diffusion.samplers import SAMPLERS
from ldm.latent_diffusion import LatentDiffusion, sample, sampling_sigmas

log = logging.getLogger(__name__)

GRID, NPZ = "grid.png", "samples.npz"
_GRID_MOST = 400  # images on one sheet, and
_GRID_PIXELS = 2**26  # its pixels
_DEFAULTS = {"sampler": "euler", "steps": 30, "guidance": 1.0, "spacing": None, "eta": None}
# What a group of images may cost the network, in parameters times positions of the latent (about as many
# multiplications), and how many there are at most: enough to keep small networks busy, one image for large
# ones.
_GROUP_COST, _GROUP_MOST = 4e9, 16


@dataclass(frozen=True)
class SampleRequest:
    """What the user asked for; None leaves a setting to the model."""

    n: int = 16
    classes: str | None = None
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    spacing: str | None = None
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
        sampling_sigmas(model.denoiser, chosen["steps"], chosen["spacing"], chosen["sampler"])
        return chosen


def _check_eta(sampler: str, eta: float | None) -> None:
    if eta is not None and sampler != "ddim":
        raise ValueError(f"--eta belongs to the ddim sampler, not to {sampler}")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta:g} must be from 0 to 1")


@dataclass(frozen=True)
class Written:
    """What is in the folder now; `on_sheet` is "all" or how many the grid shows."""

    count: int
    files: list[Path]
    on_sheet: str


def group_size(model: LatentDiffusion) -> int:
    """How many images are computed together where the same bits are wanted whatever the batch size.

    Kernels round differently for different batch shapes, so the shape has to be fixed, by the model alone.
    """
    cost = sum(p.numel() for p in model.network.parameters()) * math.prod(model.latent_shape[1:])
    most = min(_GROUP_MOST, max(1.0, _GROUP_COST / max(cost, 1)))
    return 2 ** int(math.log2(most))


def draw(model: LatentDiffusion, request: SampleRequest, labels: list[int] | None) -> Iterator[Tensor]:
    """Batches of images (B, C, H, W), about in [-1, 1], on the CPU, in order.

    An exact request is computed in groups of `group_size`, the last one filled up with images that are thrown
    away: image i then always has place i mod G in a batch of G, and goes through the same arithmetic.
    """
    settings = request.settings(model)
    count = len(labels) if labels is not None else request.n
    exact = model.device.type == "cpu" if request.exact is None else request.exact
    size = group_size(model) if exact else request.batch_size
    for start in range(0, count, size):
        wanted = min(size, count - start)
        computed = size if exact else wanted
        cond = None
        if labels is not None:
            batch = labels[start : start + wanted]
            batch = batch + [batch[-1]] * (computed - wanted)
            with torch.no_grad():
                cond = model.conditioner({"label": torch.tensor(batch, device=model.device)})
        try:
            z = sample(model, computed, cond, seed=request.seed, first_index=start, **settings)
            images = model.to_image(z)[:wanted].float().cpu()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, computed) from error
        if not images.isfinite().all():
            raise ValueError(
                f"images {start} to {start + wanted - 1} are not finite: the model diverged in training, "
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
    """Load the model, draw, and write `00000-<class>.png` ..., `grid.png`, `samples.npz` into `out`.

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
    labels = choose_labels(model, request.classes, request.n)
    settings = request.settings(model)
    count = len(labels) if labels is not None else request.n
    names = _file_names(model, labels, count)
    prepare_folder(out, [*names, *[GRID] * grid, *[NPZ] * npz], overwrite)
    _warn_of_others(out, names)
    facts = _facts(model, source, request.seed, settings)
    of_class = (
        [{"class": class_names(model)[label]} for label in labels] if labels is not None else [{}] * count
    )
    sheet: list[np.ndarray] = []
    done = 0
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(NpzWriter.at(out / NPZ, count)) if npz else None
            bar = stack.enter_context(progress_bar(count, "sampling"))
            stack.enter_context(context)
            for images in draw(model, request, labels):
                pixels = to_uint8(images)
                if archive is not None:
                    archive.add(pixels)
                for picture in pixels:
                    write_png(out / names[done], picture, {"index": done, **of_class[done], **facts})
                    done += 1
                    bar.update(1)
                if grid:
                    sheet += list(pixels[: _room_on_sheet(pixels) - len(sheet)])
            if archive is not None:
                archive.finish(labels)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped: {done} of {count} images are in {out}, each of them whole"
        ) from None
    if grid:
        # A row a class where that is how they were asked for.
        columns = request.n if request.classes is not None and request.n <= 20 else None
        with whole_file(out / GRID) as file:
            pixel_grid(np.stack(sheet), columns).save(file, "png")
    return Written(
        count, [out / name for name in names], "all" if len(sheet) == count else f"the first {len(sheet)}"
    )


def _room_on_sheet(pixels: np.ndarray) -> int:
    """How many images of this size, (B, H, W) or (B, H, W, C), one sheet holds."""
    return min(_GRID_MOST, max(1, _GRID_PIXELS // (pixels.shape[1] * pixels.shape[2])))


def _file_names(model: LatentDiffusion, labels: list[int] | None, count: int) -> list[str]:
    digits = max(5, len(str(count - 1)))
    if labels is None:
        return [f"{i:0{digits}d}.png" for i in range(count)]
    safe = [safe_name(name) for name in class_names(model)]
    return [f"{i:0{digits}d}-{safe[label]}.png" for i, label in enumerate(labels)]


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
