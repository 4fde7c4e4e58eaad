"""Options that several verbs have, and the panels of the help page in which options stand."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

FILES, MACHINE = "Files", "Machine"


def _option(metavar: str, text: str, *names: str, panel: str | None = None, **more):
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, **more)


def in_panel(panel: str | None, **defaults) -> Callable:
    """Makes options of one panel, `option(METAVAR, help, *names, ...)`; a switch has no metavar."""
    return partial(_option, panel=panel, **defaults)


of_files, of_machine = in_panel(FILES), in_panel(MACHINE)


def _set_verbose(verbose: bool) -> bool:
    if verbose:
        logging.getLogger("ldm").setLevel(logging.DEBUG)
    return verbose


_MODEL = "A run folder, its model.safetensors, or one of its checkpoints."
Model = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help=_MODEL)]
Config = Annotated[
    Path | None,
    _option(
        "YAML",
        "For a checkpoint of another project, its YAML; for a model with classes of yours, the YAML that it "
        "was trained with.",
        "--config",
        show_default=False,
    ),
]
_EMA = "Averaged weights, or the raw ones of the newest checkpoint."
Ema = Annotated[bool, _option("", _EMA, "--ema/--no-ema")]
Overwrite = Annotated[
    bool,
    of_files(
        "",
        "Replace files of the same names; others in the folder stay. Without it, any such file is an error "
        "before anything is computed.",
        "--overwrite",
    ),
]
Device = Annotated[str, of_machine("NAME", "cpu, cuda, cuda:1 or mps; auto takes a GPU if there is one.")]
Precision = Annotated[
    str,
    of_machine(
        "NAME",
        "32, bf16 or fp16 (autocast over float32 weights); auto is bf16 on a GPU that has it, else 32.",
    ),
]
_SUITS = "what suits the machine"
Workers = Annotated[int | None, of_machine("N", "Processes that read images.", min=0, show_default=_SUITS)]
_VERBOSE = "Show debug messages, and tracebacks of errors."
Verbose = Annotated[bool, of_machine("", _VERBOSE, "--verbose", callback=_set_verbose)]
