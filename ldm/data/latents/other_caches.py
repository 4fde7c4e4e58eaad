"""Latent caches of the same images that lie beside a new one."""

import json
import logging
from pathlib import Path

from ldm.data.latents.fill import MANIFEST
from ldm.wording import counted, some

logger = logging.getLogger(__name__)


def other_caches(directory: Path, images: str) -> dict[Path, int]:
    """Folders beside `directory` with latents of the data set of this fingerprint, and their bytes."""
    found = {}
    for file in sorted(directory.parent.glob(f"*/{MANIFEST}")):
        if file.parent == directory:
            continue
        try:
            manifest = json.loads(file.read_text())
            if manifest["made_from"]["images"] == images:
                found[file.parent] = sum(manifest["files"].values()) + file.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # damaged, or something else by that name
    return found


def tell_other_caches(directory: Path, images: str) -> None:
    """One line about what older caches of the same images take; nothing is deleted."""
    if found := other_caches(directory, images):
        logger.info(
            "older latents of these images, by other first stages or settings, take %.2f GB in %s under %s "
            "(%s): delete what no run needs any more",
            sum(found.values()) / 1e9,
            counted(len(found), "folder"),
            directory.parent,
            some([path.name for path in found]),
        )
