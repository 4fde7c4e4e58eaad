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

    for line in convert(source, target, to.value, config=config, ema=ema, overwrite=overwrite):
        typer.echo(line)
