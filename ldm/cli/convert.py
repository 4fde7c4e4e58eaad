"""`ldm convert SRC DST --to {native,compvis,diffusers}`"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    """What a model can be written as."""

    native = "native"
    compvis = "compvis"
    diffusers = "diffusers"


_OPENED_WITH = {
    Format.native: "ldm.load or sample.py",
    Format.compvis: "the original's code and the YAML beside it, or with ldm.load",
    Format.diffusers: "diffusers, part by part, or all of it with ldm.load",
}


def command(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Whatever ldm.load opens: a run, a file, a folder.")
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="native: a .safetensors file; compvis: a .ckpt file, its YAML is written beside it; "
            "diffusers: a folder. A folder for native or compvis gets model.safetensors or model.ckpt.",
        ),
    ],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    config: Annotated[
        Path | None, typer.Option(help="The YAML of SRC, where SRC does not describe itself.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema/--no-ema", help="Averaged or raw weights of SRC.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
) -> None:
    """Write a model in another format: this toolkit's, the original LDM's, or that of diffusers.

    What a format cannot express is refused with the reason. Converted back, a model has the same bits.
    """
    from ldm.checkpoints.convert import convert

    try:
        written = convert(source, target, to.value, config=config, ema=ema, overwrite=overwrite)
    except FileExistsError as error:
        hint = "choose another folder" if to is Format.diffusers else "choose another DST, or say --overwrite"
        raise FileExistsError(f"{error}; {hint}") from error
    for note in written.notes:
        typer.echo(f"note: {config}: {note}")
    typer.echo(f"{written.path}: open it with {_OPENED_WITH[to]}")
