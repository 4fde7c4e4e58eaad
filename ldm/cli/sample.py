"""`ldm sample MODEL`"""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import FILES, MACHINE, Config, Device, Ema, Model, Overwrite, Precision, Verbose

_WHAT, _HOW = "What to draw", "How to draw it"
_OWN = "the model's own"


def command(
    model: Model,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            min=1,
            metavar="N",
            rich_help_panel=_WHAT,
            help="How many images; with --classes or --image, of each class and each image.",
        ),
    ] = 16,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            rich_help_panel=_WHAT,
            show_default="all in turn",
            help="Names or numbers with commas and ranges: cat,dog or 0-4,7. Where classes are named by "
            "numbers, a number is a name.",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=_WHAT,
            show_default=False,
            help="An image, or a folder of images read to any depth, for a model that draws variations of "
            "images: --n of each. With --classes, --n of each image with each class; without, the classes "
            "in turn.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_WHAT,
            help="Image i depends on the seed, i and its class and image alone.",
        ),
    ] = 0,
    config: Config = None,
    ema: Ema = True,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_HOW,
            show_default=_OWN,
            help="ddpm, ddim, plms, euler, heun or dpmpp_2m; each fits every model.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=_HOW, show_default=_OWN, help="Steps of the sampler."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="SCALE",
            rich_help_panel=_HOW,
            show_default=_OWN,
            help="Classifier-free guidance towards class and image: 1 is none, more follows more closely.",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            metavar="ETA",
            rich_help_panel=_HOW,
            show_default=_OWN,
            help="Noise added by ddim, from 0 (none) to 1 (as much as ddpm).",
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_HOW,
            show_default="what suits the sampler",
            help="How steps are spaced, for models with discrete timesteps: linspace, respaced, "
            "trailing, leading, karras, or uniform and quad as in the original DDIM.",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            rich_help_panel=_HOW,
            show_default=_OWN,
            help="How far the steps of a flow model are moved towards noise: 1 is not at all, 3 is usual for "
            "large images.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", rich_help_panel=FILES, help="Where the images go.")
    ] = Path("samples"),
    grid: Annotated[
        bool,
        typer.Option(
            "--grid/--no-grid", metavar="", rich_help_panel=FILES, help="Also all on one sheet, grid.png."
        ),
    ] = True,
    npz: Annotated[
        bool,
        typer.Option(
            "--npz",
            metavar="",
            rich_help_panel=FILES,
            help="Also all in samples.npz: arr_0 uint8 (N, H, W, C), arr_1 labels.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=MACHINE,
            help="Images at a time: memory and speed. It changes pixels by rounding at most, with --exact "
            "nothing at all.",
        ),
    ] = 64,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            metavar="",
            rich_help_panel=MACHINE,
            show_default="on the CPU",
            help="Compute in groups of a fixed size, chosen by the model: the same bits whatever --n and "
            "--batch-size.",
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
    from ldm.cli.sampling import SampleRequest, write_samples

    request = SampleRequest(
        n=n,
        classes=classes,
        image=image,
        seed=seed,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        eta=eta,
        spacing=spacing,
        shift=shift,
        batch_size=batch_size,
        exact=exact,
    )
    written = write_samples(
        model,
        request,
        out,
        config=config,
        ema=ema,
        grid=grid,
        npz=npz,
        device=device,
        precision=precision,
        overwrite=overwrite,
    )
    if written.count == 1:
        typer.echo(f"1 image: {written.files[0]}")
    else:
        sheet = f", {written.on_sheet} on one sheet: {out / 'grid.png'}" if grid else ""
        typer.echo(f"{written.count} images in {out}{sheet}")
    if written.unreadable:
        what = "1 image that" if written.unreadable == 1 else f"{written.unreadable} images that"
        typer.echo(f"error: nothing is drawn of {what} cannot be read, see above", err=True)
        raise typer.Exit(1)
