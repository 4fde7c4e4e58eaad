"""`ldm encode MODEL IMAGES`"""

import os
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import FILES, MACHINE, Config, Device, Ema, Model, Overwrite, Precision, Verbose

_WORST = 5


def command(
    model: Model,
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES", help="A folder of images, read to any depth, or one image.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", rich_help_panel=FILES, help="Where the results go.", show_default=False
        ),
    ],
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PIXELS",
            show_default="as trained",
            help="Side to which the centre of each image is resized; a multiple of the downsampling factor.",
        ),
    ] = None,
    config: Config = None,
    ema: Ema = True,
    latents: Annotated[
        bool,
        typer.Option(
            "--latents",
            metavar="",
            rich_help_panel=FILES,
            help="Also latents.safetensors: mean and std float32 (N, c, h, w), the paths in its metadata.",
        ),
    ] = False,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid/--no-grid",
            metavar="",
            rich_help_panel=FILES,
            help="Also grid.png: images beside reconstructions.",
        ),
    ] = True,
    overwrite: Overwrite = False,
    batch_size: Annotated[
        int,
        typer.Option(min=1, metavar="N", rich_help_panel=MACHINE, help="Images at a time: memory and speed."),
    ] = 16,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=MACHINE,
            show_default="what suits the machine",
            help="Processes that read images.",
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    verbose: Verbose = False,
) -> None:
    """Pass images through an autoencoder and see what is left of them.

    MODEL is a first stage, or a diffusion model, of which the first stage is then taken.

    Writes the reconstructions as PNGs into --out/reconstructions, in the folders that the images were in,
    and figures.csv with PSNR and L1 of each image. Prints their means and the worst images.

    Each image that cannot be read is named, and ends the command with status 1.

    Example: ldm encode runs/pets-autoencoder photos/ --out out/pets-autoencoder
    """
    from ldm.cli.encoding import encode_images

    result = encode_images(
        model,
        images,
        out,
        size=size,
        batch_size=batch_size,
        workers=workers,
        config=config,
        ema=ema,
        latents=latents,
        grid=grid,
        device=device,
        precision=precision,
        overwrite=overwrite,
    )
    if result.figures:
        psnr, l1 = ([getattr(f, name) for f in result.figures] for name in ("psnr", "l1"))
        typer.echo(f"{_images(len(psnr))} of {result.size}x{result.size} pixels through {result.model}")
        typer.echo(f"PSNR  mean {sum(psnr) / len(psnr):6.2f} dB   worst {min(psnr):6.2f} dB")
        typer.echo(
            f"L1    mean {sum(l1) / len(l1):6.4f}      worst {max(l1):6.4f}      (black to white is 2)"
        )
        typer.echo("lowest PSNR:")
        for figure in sorted(result.figures, key=lambda f: f.psnr)[:_WORST]:
            typer.echo(f"  {figure.psnr:6.2f} dB   L1 {figure.l1:6.4f}   {_shown(figure.path)}")
        typer.echo(f"written to {out}" + (f"; side by side: {out / 'grid.png'}" if grid else ""))
    for path, reason in result.unreadable:
        typer.echo(f"{_shown(path)}: {reason}", err=True)
    if result.unreadable:
        typer.echo(f"error: no reconstruction of {_images(len(result.unreadable))}, see above", err=True)
        raise typer.Exit(1)


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _shown(path: str) -> str:
    """A path for the screen, even one that is no text."""
    return os.fsencode(path).decode("utf-8", "replace")
