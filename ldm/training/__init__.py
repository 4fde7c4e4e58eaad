"""The only room that knows Lightning: runs, from a YAML to a run folder."""

import os
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
        OSError: a checkpoint cannot be written, or a process that reads images has died.
        KeyboardInterrupt: the run was told to stop (Ctrl-C, SIGTERM); its checkpoint is written.
    """
    cfg, keys = load_run(path, overrides, look_first=_check_images)
    # Only now: a mistake in the config should not wait for torch and Lightning to be imported.
    from ldm.data.loading.workers import clear_worker_errors
    from ldm.training.loop.fit import fit

    with clear_worker_errors():
        return fit(cfg, keys)


def dry_run(path: str | Path, overrides: Iterable[str] = ()) -> str:
    """Try a config on one batch; returns a report of parameters, shapes, losses and memory.

    One device works through its share of a batch; a discriminator takes part from the start. Latents are not
    cached and not measured, and no run folder is made.
    """
    cfg, keys = load_run(path, overrides, look_first=_check_images)
    from ldm.training.trial import one_step

    return one_step(cfg, keys)


def _check_images(cfg) -> None:
    """ValueError where a run that is to begin names a folder of images that is not there.

    The data set says the same, many seconds of importing later. A run with checkpoints may be complete and
    need no images any more.
    """
    data = cfg.get("data") or {}
    if data.get("target") not in ("ldm.data.ImageFolder", "ldm.data.images.image_folder.ImageFolder"):
        return
    root = (data.get("params") or {}).get("root")
    begun = Path(str(cfg.get("runs", "runs")), str(cfg.get("name")), "checkpoints").exists()
    if not isinstance(root, str) or begun:
        return
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"image folder {root} {what}")
