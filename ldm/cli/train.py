"""`ldm train CONFIG [KEY=VALUE ...]`"""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import Overrides, Verbose, argument, option

_YAML = "The YAML of the run, for example configs/quickstart/autoencoder.yaml."
_PRINT = "Print the whole config, with defaults and changes, and stop."
_DRY_RUN = "Build everything, run one batch forward and backward, print sizes and memory, and stop."


def command(
    config: Annotated[Path, argument("CONFIG", _YAML)],
    overrides: Overrides = None,
    print_config: Annotated[bool, option("", _PRINT, "--print-config")] = False,
    dry_run: Annotated[bool, option("", _DRY_RUN, "--dry-run")] = False,
    verbose: Verbose = False,
) -> None:
    """Train the autoencoder or the diffusion model that CONFIG describes.

    The run lives in the folder runs/<name>. Ctrl-C stops it after its current step, with a checkpoint, and
    the same command continues it in the same bits.

    Example: python train.py configs/quickstart/autoencoder.yaml training.steps=1000
    """
    if print_config:
        from ldm.training.run_config import complete_yaml, load_run

        typer.echo(complete_yaml(*load_run(config, overrides or [])).rstrip())
        return
    if dry_run:
        from ldm.training import dry_run as try_one_batch

        typer.echo(try_one_batch(config, overrides or []))
        return
    from ldm.training import train

    folder = train(config, overrides or [])
    if folder is not None:  # one of several processes speaks
        typer.echo(f"done: {folder}")
