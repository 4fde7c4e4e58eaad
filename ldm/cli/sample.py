"""`ldm sample MODEL`"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.options import (
    Config,
    Device,
    Ema,
    Model,
    Overwrite,
    Precision,
    Verbose,
    of_files,
    of_machine,
    option,
)
from ldm.wording import counted

_what = partial(option, panel="What to draw")
_how = partial(option, panel="How to draw it", show_default="the model's own")

_N = "How many images; with --classes or --image, of each class and image."
_CLASSES = "Names or numbers, with commas and ranges: cat,dog or 0-4,7; a name goes before a number."
_IMAGE = "An image, or a folder of images, to draw variations of; with --classes, each image with each class."
_CONDITION = "What else the model reads, such as caption='a red fox' or size=64,64; repeatable."
_SEED = "Image i depends on the seed, i and its conditions alone."
_SAMPLER = "ddpm, ddim, plms, euler, heun, dpmpp_2m, or a function of yours, mypackage.my_sampler."
_GUIDANCE = "Classifier-free guidance: 1 is none, more follows the conditions more closely."
_OPTION = "What the sampler takes besides, such as variance=large of ddpm; repeatable."
_ETA = "--option eta=ETA: noise added by ddim, from 0 (none) to 1 (as much as ddpm)."
_SPACING = "Of discrete timesteps: linspace, respaced, trailing, leading, karras, uniform or quad."
_SHIFT = "How far a flow model's steps are moved towards noise: 1 is not at all, 3 usual for large images."
_NPZ = "Also all in samples.npz: arr_0 uint8 (N, H, W, C), arr_1 labels."
_BATCH = "Images at a time: memory and speed. It changes pixels by rounding at most."
_EXACT = "Compute in groups of a fixed size: the same bits whatever --n and --batch-size."


def command(
    model: Model,
    n: Annotated[int, _what("N", _N, "--n", min=1)] = 16,
    classes: Annotated[str | None, _what("LIST", _CLASSES, show_default="all in turn")] = None,
    image: Annotated[Path | None, _what("PATH", _IMAGE, show_default=False)] = None,
    condition: Annotated[list[str] | None, _what("KEY=VALUE", _CONDITION, show_default=False)] = None,
    seed: Annotated[int, _what("N", _SEED, min=0)] = 0,
    config: Config = None,
    ema: Ema = True,
    sampler: Annotated[str | None, _how("NAME", _SAMPLER)] = None,
    steps: Annotated[int | None, _how("N", "Steps of the sampler.", min=1)] = None,
    guidance: Annotated[float | None, _how("SCALE", _GUIDANCE)] = None,
    option: Annotated[list[str] | None, _how("NAME=VALUE", _OPTION)] = None,
    eta: Annotated[float | None, _how("ETA", _ETA)] = None,
    spacing: Annotated[str | None, _how("NAME", _SPACING, show_default="what suits the sampler")] = None,
    shift: Annotated[float | None, _how("NUMBER", _SHIFT)] = None,
    out: Annotated[Path, of_files("FOLDER", "Where the images go.")] = Path("samples"),
    grid: Annotated[bool, of_files("", "Also all on one sheet, grid.png.", "--grid/--no-grid")] = True,
    npz: Annotated[bool, of_files("", _NPZ, "--npz")] = False,
    overwrite: Overwrite = False,
    batch_size: Annotated[int, of_machine("N", _BATCH, min=1)] = 64,
    exact: Annotated[
        bool | None, of_machine("", _EXACT, "--exact/--no-exact", show_default="on the CPU")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    verbose: Verbose = False,
) -> None:
    """Draw images from a trained diffusion model.

    Writes 00000-<class>.png, 00001-<class>.png, ... into the folder --out, and all of them on one sheet,
    grid.png. Each PNG says in its text chunk "ldm" how it was drawn.

    Variations of images are 00000-<image>.png, ..., on the sheet a row of them behind each image. Images that
    cannot be read are named, and end the command with status 1 when those of the others are drawn.

    Example: python sample.py runs/pets --classes cat,dog --n 16 --guidance 3 --out out/pets

    Example: python sample.py runs/variations --image photos/ --n 8 --out out/variations
    """
    from ldm.checkpoints import load
    from ldm.cli.machine import arranged, autocast, pick_device
    from ldm.cli.output import refuse_inside
    from ldm.cli.results import facts_of, settle, write_drawn
    from ldm.cli.wanted import choose
    from ldm.sampling import draw

    asked = {"sampler": sampler, "steps": steps, "guidance": guidance, "spacing": spacing, "shift": shift}
    asked |= {"eta": eta, **_options(option or [])}
    target = pick_device(device)
    context = autocast(precision, target)
    found = load(model, config, ema=ema)
    settings = settle(found, str(model), asked)
    if image is not None:
        refuse_inside(out, image)
    wanted = choose(found, n, classes, image, condition or [])
    batch = wanted.batch if wanted.conditions else None
    how = {"seed": seed, "settings": settings, "batch_size": batch_size, "exact": exact}
    batches = draw(arranged(found, target), wanted.count, batch, **how)
    facts = facts_of(found, model, seed, settings)
    with context:
        typer.echo(write_drawn(out, batches, wanted, facts, grid=grid, npz=npz, overwrite=overwrite))
    if wanted.pictures is not None and wanted.pictures.unreadable:
        bad = counted(len(wanted.pictures.unreadable), "image that", "images that")
        typer.echo(f"error: nothing is drawn of {bad} cannot be read, see above", err=True)
        raise typer.Exit(1)


def _options(words: list[str]) -> dict[str, Any]:
    """["eta=0.5"] -> {"eta": 0.5}, the values as in YAML."""
    import yaml
    from omegaconf import OmegaConf

    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"--option {' '.join(words)}: a value is not YAML") from error
    if None in found.values():
        raise typer.BadParameter(f"--option {' '.join(words)}: must be NAME=VALUE")
    return found
