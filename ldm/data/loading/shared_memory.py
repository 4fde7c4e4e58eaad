"""The memory through which worker processes hand over batches: how much there is, and what fits."""

import logging
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset, Sampler

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
# Index, position and label of a batch take a page each.
_SMALL_TENSORS = 16 << 10
_IN_HAND = 2  # batches that have arrived and are being copied
_SHARE = 2  # "auto" takes at most this part of what is free: validation comes beside training
MORE = "docker run --shm-size=2g or --ipc=host gives a container more"

_told: set[str] = set()


class SharedMemoryFull(OSError):
    """There is no room to hand over a batch."""


def free_bytes() -> int | None:
    """What is free; None where the system sets no limit of its own to it."""
    if sys.platform != "linux":
        return None
    try:
        return shutil.disk_usage(FOLDER).free
    except OSError:
        return None


def to_shared(tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor into shared memory.

    Workers do it here rather than leave it to their queue, whose thread would drop a batch that finds no room
    and let the main process wait for it for ever.

    Raises:
        SharedMemoryFull: there is no room.
    """
    if not tensor.numel():
        return tensor
    try:
        return tensor.contiguous().share_memory_()
    except RuntimeError as error:
        if "unable to" not in str(error):  # allocate, resize or write the file that it is
            raise
        free = free_bytes()
        has = "" if free is None else f", with {megabytes(free)} free,"
        raise SharedMemoryFull(
            f"the shared memory ({FOLDER}){has} has no room for {megabytes(tensor.nbytes)} that a worker "
            f"process hands over. training.workers=0 (--workers 0) works without such processes; {MORE}"
        ) from error


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def batch_bytes(dataset: Dataset, batch_sampler: Sampler) -> int:
    """What a batch takes on its way out of a worker; 0 for data sets that do not say what a sample takes."""
    sample = getattr(dataset, "sample_bytes", 0)
    size = getattr(batch_sampler, "batch_size", 0) // getattr(batch_sampler, "world_size", 1)
    return sample * size + _SMALL_TENSORS if sample and size else 0


def needed_bytes(batch: int, workers: int, prefetch: int) -> int:
    """Most that is in use at once."""
    return batch * (workers * prefetch + _IN_HAND)


def workers_that_fit(workers: int, batch: int, prefetch: int, ranks: int) -> int:
    """At most `workers`, so many that their batches take no more than half of what a process has; says so
    once where these are fewer."""
    free = free_bytes()
    if not workers or not batch or free is None:
        return workers
    room = free // ranks // _SHARE
    fit = max(0, min(workers, (room // batch - _IN_HAND) // prefetch))
    if fit < workers:
        _tell_once(
            "fewer",
            f"{fit} instead of {workers} worker processes read images: all would take up to "
            f"{megabytes(ranks * needed_bytes(batch, workers, prefetch))} of shared memory, as much again in "
            f"validation, and {FOLDER} has {megabytes(free)} free; {MORE}",
        )
    return fit


def warn_unless_fitting(workers: int, batch: int, prefetch: int, ranks: int) -> None:
    """Say once that a number of workers that somebody asked for needs more than there is."""
    free, needed = free_bytes(), ranks * needed_bytes(batch, workers, prefetch)
    if workers and batch and free is not None and needed > free:
        _tell_once(
            "asked",
            f"{workers} worker process{'' if workers == 1 else 'es'} may need {megabytes(needed)} of shared "
            f"memory, {FOLDER} has {megabytes(free)} free: the run stops if it does not suffice. "
            f"training.workers=0 (--workers 0) works without it; {MORE}",
        )


def _tell_once(topic: str, text: str) -> None:
    if topic not in _told:
        _told.add(topic)
        logger.warning("%s", text)
