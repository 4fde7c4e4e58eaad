"""`ldm plan CONFIG [KEY=VALUE ...]`"""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import Overrides, Verbose, argument, of_machine, option

_YAML = "The YAML of a run, of a published model, or of a network alone (target and params)."
_SIZE = "Side of the images, or of the input of a network alone."
_CLASSES = "Number of classes, where the data would be asked."
_TFLOPS = "1e12 operations a second at best; bf16: RTX 3090 71, RTX 4090 165, A100 312, H100 and H200 989."
_EMBEDDED, _SUITS = "the embedded data's, else 1000", "what suits the network"


def command(
    config: Annotated[Path, argument("CONFIG", _YAML)],
    overrides: Overrides = None,
    size: Annotated[int | None, option("PIXELS", _SIZE, min=1, show_default="the config's")] = None,
    classes: Annotated[int | None, option("N", _CLASSES, min=1, show_default=_EMBEDDED)] = None,
    depth: Annotated[
        int | None, option("N", "Depth of the table of layers.", min=0, show_default=_SUITS)
    ] = None,
    memory: Annotated[float, of_machine("GIB", "Memory of a GPU.", min=0)] = 24.0,
    tflops: Annotated[float, of_machine("NUMBER", _TFLOPS, min=0)] = 165.0,
    utilisation: Annotated[
        float, of_machine("SHARE", "The share of it that is reached.", min=0, max=1)
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

    request = PlanRequest(size, classes, memory, tflops, utilisation, depth)
    typer.echo(report(make_plan(config, overrides or [], request)))
