"""Options that several verbs have, and the panels of the help page in which options stand."""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def argument(metavar: str, text: str):
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def option(metavar: str, text: str, *names: str, panel: str | None = None, **more):
    """A switch has no metavar."""
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, **more)


of_files, of_machine = partial(option, panel="Files"), partial(option, panel="Machine")


def _set_verbose(verbose: bool) -> bool:
    if verbose:
        logging.getLogger("ldm").setLevel(logging.DEBUG)
    return verbose


_OVERRIDES = "Changes to the YAML, for example training.steps=1000 or name=second-try."
Overrides = Annotated[list[str] | None, argument("KEY=VALUE", _OVERRIDES)]

Model = Annotated[Path, argument("MODEL", "A run folder, its model.safetensors, or one of its checkpoints.")]
_CONFIG = "The YAML of a checkpoint of another project, or of a model with classes of yours."
Config = Annotated[Path | None, option("YAML", _CONFIG, "--config", show_default=False)]
_EMA = "Averaged weights, or the raw ones of the newest checkpoint."
Ema = Annotated[bool, option("", _EMA, "--ema/--no-ema")]

_OVERWRITE = "Replace files of the same names; others in the folder stay."
Overwrite = Annotated[bool, of_files("", _OVERWRITE, "--overwrite")]

Device = Annotated[str, of_machine("NAME", "cpu, cuda, cuda:1 or mps; auto takes a GPU if there is one.")]
_PRECISION = "32, bf16 or fp16 (autocast over float32 weights); auto is bf16 on a GPU that has it, else 32."
Precision = Annotated[str, of_machine("NAME", _PRECISION)]
_SUITS = "what suits the machine"
Workers = Annotated[int | None, of_machine("N", "Processes that read images.", min=0, show_default=_SUITS)]
_VERBOSE = "Show debug messages, and tracebacks of errors."
Verbose = Annotated[bool, of_machine("", _VERBOSE, "--verbose", callback=_set_verbose)]
