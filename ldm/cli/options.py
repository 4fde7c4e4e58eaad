"""Options that several verbs have."""

import logging
from pathlib import Path
from typing import Annotated

import typer

FILES, MACHINE = "Files", "Machine"


def _set_verbose(verbose: bool) -> bool:
    if verbose:
        logging.getLogger("ldm").setLevel(logging.DEBUG)
    return verbose


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A run folder, its model.safetensors, or one of its checkpoints.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="YAML",
        help="For a checkpoint of another project, its YAML; for a model with classes of yours, the YAML "
        "that it was trained with.",
        show_default=False,
    ),
]
Ema = Annotated[
    bool,
    typer.Option(
        "--ema/--no-ema", metavar="", help="Averaged weights, or the raw ones of the newest checkpoint."
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        metavar="",
        rich_help_panel=FILES,
        help="Replace files of the same names; others in the folder stay. Without it, any such file is an "
        "error before anything is computed.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MACHINE,
        help="cpu, cuda, cuda:1 or mps; auto takes a GPU if there is one.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MACHINE,
        help="32, bf16 or fp16 (autocast over float32 weights); auto is bf16 on a GPU that has it, else 32.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        metavar="",
        callback=_set_verbose,
        rich_help_panel=MACHINE,
        help="Show debug messages, and tracebacks of errors.",
    ),
]
