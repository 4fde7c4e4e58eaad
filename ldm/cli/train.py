"""`ldm train CONFIG [KEY=VALUE ...]`"""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import Verbose


def command(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="The YAML of the run, for example configs/quickstart/autoencoder.yaml.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the YAML, for example training.steps=1000 or name=second-try.",
            show_default=False,
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", metavar="", help="Print the whole config, with defaults and changes, and stop."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            help="Build everything, run one batch forward and backward, print sizes and memory, and stop.",
        ),
    ] = False,
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
