"""`--dry-run`: everything built, one batch forward and backward, nothing kept."""

from collections.abc import Iterable
from pathlib import Path

from ldm.training.run import check_images
from ldm.training.run_config import load_run


def dry_run(path: str | Path, overrides: Iterable[str] = ()) -> str:
    """Try a config on one batch; returns a report of parameters, shapes, losses and memory.

    One device works through its share of a batch; a discriminator takes part from the start. Latents are not
    cached and not measured, and no run folder is made.
    """
    cfg, run = load_run(path, overrides)
    check_images(cfg, run)
    # Only now: a mistake in the config should not wait for torch and Lightning to be imported.
    from ldm.training.trial import one_step

    return one_step(cfg, run)
