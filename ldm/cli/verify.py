"""`ldm verify FOLDER`"""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import Verbose, Workers, argument


def command(
    folder: Annotated[Path, argument("FOLDER", "Images, with or without one subfolder a class.")],
    workers: Workers = None,
    verbose: Verbose = False,
) -> None:
    """Read every image of a folder and name those that cannot be read.

    Prints one line for each of them, and ends with status 1 if there are any.
    """
    from ldm.cli.machine import progress_bar
    from ldm.data import ImageFolder
    from ldm.data.images.bad_files import verify

    images = ImageFolder(folder, size=1, on_error="report", layout="flat")
    with progress_bar(len(images), "reading") as bar:
        processes = "auto" if workers is None else workers
        bad = verify(images, processes, lambda done, total: bar.update(done - bar.n))
    for file in bad:
        typer.echo(f"{file.path}: {file.reason}")
    count = f"{len(images) + len(images.empty_files()):,} images"
    typer.echo(f"{len(bad)} of {count} cannot be read" if bad else f"all {count} can be read")
    raise typer.Exit(1 if bad else 0)
