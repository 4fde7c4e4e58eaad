"""`ldm plan CONFIG [KEY=VALUE ...]`"""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import MACHINE, Verbose


def command(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="The YAML of the run, for example configs/diffusion/dit-b-f8.yaml; of a published model; or "
            "of a network alone (target and params).",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the YAML, for example training.batch_size=256 or "
            "first_stage=configs/autoencoder/kl-f8.yaml.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PIXELS",
            help="Side of the images, or of the input of a network alone.",
            show_default="the config's",
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of classes, where the data would be asked.",
            show_default="the embedded data's, else 1000",
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="How deep the table of layers goes.",
            show_default="what suits the network",
        ),
    ] = None,
    memory: Annotated[
        float, typer.Option(min=0, metavar="GIB", rich_help_panel=MACHINE, help="Memory of a GPU.")
    ] = 24.0,
    tflops: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="NUMBER",
            rich_help_panel=MACHINE,
            help="What a GPU computes at best, in 1e12 operations a second. Dense bf16: RTX 3090 71, "
            "RTX 4090 165, A100 312, H100 and H200 989.",
        ),
    ] = 165.0,
    utilisation: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="SHARE",
            rich_help_panel=MACHINE,
            help="The share of it that is reached.",
        ),
    ] = 0.4,
    verbose: Verbose = False,
) -> None:
    """What a run would need: parameters, FLOPs, memory by layer, the largest batch, hours.

    Nothing is trained, read or downloaded, and no weights are made: the networks are built without values.
    The data is not asked either; --size and --classes stand in for it.

    Example: ldm plan configs/diffusion/dit-xl-f8.yaml --memory 80 --tflops 989
    """
    if not tflops * utilisation > 0:
        raise typer.BadParameter("--tflops and --utilisation must be above 0")
    from ldm.planning.planned import PlanRequest, make_plan
    from ldm.planning.report import report

    request = PlanRequest(
        size=size, classes=classes, memory=memory, tflops=tflops, utilisation=utilisation, depth=depth
    )
    typer.echo(report(make_plan(config, overrides or [], request)))
