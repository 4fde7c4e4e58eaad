"""`train`: one command from a YAML to a run folder; the same command again continues it."""

from collections.abc import Iterable
from pathlib import Path

from ldm.training.run_config import load_run


def train(path: str | Path, overrides: Iterable[str] = ()) -> Path | None:
    """Train what the config says, from the start or from where the run folder's newest checkpoint stands.

    Returns:
        The run folder; None in the processes that only help the first.

    Raises:
        ValueError: mistakes in the config, data that does not fit, a folder that holds another run, a
            gradient that stays infinite or not a number.
        OSError: a checkpoint cannot be written.
        KeyboardInterrupt: the run was told to stop (Ctrl-C, SIGTERM); its checkpoint is written.
    """
    cfg, run = load_run(path, overrides)
    # Only now: a mistake in the config should not wait for torch and Lightning to be imported.
    from ldm.training.fit import fit

    return fit(cfg, run)
