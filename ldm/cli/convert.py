"""`ldm convert SRC DST --to {native,compvis,diffusers}`"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import argument, option


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
_TARGET = "A folder; for native also a .safetensors file, for compvis a .ckpt, its YAML beside it."
_CONFIG = "The YAML of SRC, where SRC does not describe itself."


def command(
    source: Annotated[Path, argument("SRC", "Whatever ldm.load opens: a run, a file, a folder.")],
    target: Annotated[Path, argument("DST", _TARGET)],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    config: Annotated[Path | None, option("YAML", _CONFIG)] = None,
    ema: Annotated[bool, option("", "Averaged or raw weights of SRC.", "--ema/--no-ema")] = True,
    overwrite: Annotated[bool, option("", "Replace files of the same name.", "--overwrite")] = False,
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
