"""`ldm encode MODEL IMAGES`"""

import os
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli import options
from ldm.wording import counted

_WORST = 5
_IMAGES = "A folder of images, read to any depth, or one image."
_SIZE = "Side to which the centre of each image is resized; a multiple of the downsampling factor."
_LATENTS = "Also latents.safetensors: mean and std float32 (N, c, h, w), the paths in its metadata."
_GRID = "Also grid.png: images beside reconstructions."


def command(
    model: options.Model,
    images: Annotated[Path, options.argument("IMAGES", _IMAGES)],
    out: Annotated[Path, options.of_files("FOLDER", "Where the results go.", show_default=False)],
    size: Annotated[int | None, options.option("PIXELS", _SIZE, min=1, show_default="as trained")] = None,
    config: options.Config = None,
    ema: options.Ema = True,
    latents: Annotated[bool, options.of_files("", _LATENTS, "--latents")] = False,
    grid: Annotated[bool, options.of_files("", _GRID, "--grid/--no-grid")] = True,
    overwrite: options.Overwrite = False,
    batch_size: Annotated[int, options.of_machine("N", "Images at a time: memory and speed.", min=1)] = 16,
    workers: options.Workers = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    verbose: options.Verbose = False,
) -> None:
    """Pass images through an autoencoder and see what is left of them.

    MODEL is a first stage, or a diffusion model, of which the first stage is then taken.

    Writes the reconstructions as PNGs into --out/reconstructions, in the folders that the images were in,
    and figures.csv with PSNR and L1 of each image. Prints their means and the worst images.

    Each image that cannot be read is named, and ends the command with status 1.

    Example: ldm encode runs/pets-autoencoder photos/ --out out/pets-autoencoder
    """
    from ldm.checkpoints import load
    from ldm.cli.machine import arranged, autocast, pick_device
    from ldm.cli.output import refuse_inside
    from ldm.cli.results import write_reconstructed
    from ldm.data.images.given import Pictures, find_images
    from ldm.evaluation.reconstruction import first_stage_of, image_side, reconstruct

    target = pick_device(device)
    context = autocast(precision, target)
    given = find_images(images)
    refuse_inside(out, images)
    found = load(model, config, ema=ema)
    first_stage = arranged(first_stage_of(found, str(model)), target)
    side = image_side(found, size, str(model))
    pictures = Pictures(*given, side, first_stage.image_channels)
    groups = reconstruct(first_stage, pictures, batch_size, workers)
    origin = {"model": str(model), "weights": getattr(found, "description", {}).get("weights")}
    with context:
        also = {"latents": latents, "grid": grid, "overwrite": overwrite}
        figures = write_reconstructed(out, groups, pictures, origin, **also)
    if figures:
        psnr, l1 = ([getattr(figure, name) for figure in figures] for name in ("psnr", "l1"))
        count, name = len(figures), f"{type(first_stage).__name__} (f{first_stage.downsampling_factor})"
        typer.echo(f"{counted(count, 'image')} of {side}x{side} pixels through {name}")
        typer.echo(f"PSNR  mean {sum(psnr) / count:6.2f} dB   worst {min(psnr):6.2f} dB")
        typer.echo(f"L1    mean {sum(l1) / count:6.4f}      worst {max(l1):6.4f}      (black to white is 2)")
        typer.echo("lowest PSNR:")
        for path, psnr, l1 in sorted(figures, key=lambda figure: figure.psnr)[:_WORST]:
            typer.echo(f"  {psnr:6.2f} dB   L1 {l1:6.4f}   {_shown(path)}")
        typer.echo(f"written to {out}" + (f"; side by side: {out / 'grid.png'}" if grid else ""))
    for path, reason in pictures.unreadable:
        typer.echo(f"{_shown(path)}: {reason}", err=True)
    if pictures.unreadable:
        bad = counted(len(pictures.unreadable), "image")
        typer.echo(f"error: no reconstruction of {bad}, see above", err=True)
        raise typer.Exit(1)


def _shown(path: str) -> str:
    """A path for the screen, even one that is no text."""
    return os.fsencode(path).decode("utf-8", "replace")
