"""`ldm sample MODEL`"""

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
    in_panel,
    of_files,
    of_machine,
)
from ldm.wording import counted

_what, _how = in_panel("What to draw"), in_panel("How to draw it", show_default="the model's own")


def command(
    model: Model,
    n: Annotated[
        int,
        _what("N", "How many images; with --classes or --image, of each class and image.", "--n", min=1),
    ] = 16,
    classes: Annotated[
        str | None,
        _what(
            "LIST",
            "Names or numbers with commas and ranges: cat,dog or 0-4,7. Where classes are named by numbers, "
            "a number is a name.",
            show_default="all in turn",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        _what(
            "PATH",
            "An image, or a folder of images read to any depth, for a model that draws variations of images: "
            "--n of each. With --classes, --n of each image with each class; without, the classes in turn.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, _what("N", "Image i depends on the seed, i and its class and image alone.", min=0)
    ] = 0,
    config: Config = None,
    ema: Ema = True,
    sampler: Annotated[
        str | None,
        _how(
            "NAME",
            "ddpm, ddim, plms, euler, heun or dpmpp_2m, each of which fits every model; or a function of "
            "yours, mypackage.my_sampler.",
        ),
    ] = None,
    steps: Annotated[int | None, _how("N", "Steps of the sampler.", min=1)] = None,
    guidance: Annotated[
        float | None,
        _how(
            "SCALE", "Classifier-free guidance towards class and image: 1 is none, more follows more closely."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        _how(
            "NAME=VALUE",
            "What the sampler takes besides, such as variance=large of ddpm; repeatable.",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        _how("ETA", "--option eta=ETA: noise added by ddim, from 0 (none) to 1 (as much as ddpm)."),
    ] = None,
    spacing: Annotated[
        str | None,
        _how(
            "NAME",
            "How steps are spaced, for models with discrete timesteps: linspace, respaced, trailing, "
            "leading, karras, or uniform and quad as in the original DDIM.",
            show_default="what suits the sampler",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        _how(
            "NUMBER",
            "How far the steps of a flow model are moved towards noise: 1 is not at all, 3 is usual for "
            "large images.",
        ),
    ] = None,
    out: Annotated[Path, of_files("FOLDER", "Where the images go.")] = Path("samples"),
    grid: Annotated[bool, of_files("", "Also all on one sheet, grid.png.", "--grid/--no-grid")] = True,
    npz: Annotated[
        bool, of_files("", "Also all in samples.npz: arr_0 uint8 (N, H, W, C), arr_1 labels.", "--npz")
    ] = False,
    overwrite: Overwrite = False,
    batch_size: Annotated[
        int,
        of_machine(
            "N",
            "Images at a time: memory and speed. It changes pixels by rounding at most, with --exact nothing "
            "at all.",
            min=1,
        ),
    ] = 64,
    exact: Annotated[
        bool | None,
        of_machine(
            "",
            "Compute in groups of a fixed size, chosen by the model: the same bits whatever --n and "
            "--batch-size.",
            "--exact/--no-exact",
            show_default="on the CPU",
        ),
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
    from ldm.cli.results import draw_into

    asked = {"sampler": sampler, "steps": steps, "guidance": guidance, "spacing": spacing, "shift": shift}
    said, unreadable = draw_into(
        out,
        model,
        n=n,
        classes=classes,
        image=image,
        seed=seed,
        asked={**asked, "eta": eta, **_options(option or [])},
        batch_size=batch_size,
        exact=exact,
        config=config,
        ema=ema,
        grid=grid,
        npz=npz,
        device=device,
        precision=precision,
        overwrite=overwrite,
    )
    typer.echo(said)
    if unreadable:
        bad = counted(unreadable, "image that", "images that")
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
