"""The DataLoader that suits the machine: how many workers, how they start, what fits into shared memory."""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.loading.workers import (
    LOOK_AFTER,
    MORE,
    SHARED_MEMORY,
    WITHOUT,
    WorkerSide,
    WorkersLoader,
    free_bytes,
    megabytes,
    start_worker,
)

logger = logging.getLogger(__name__)

_MAX_WORKERS = 8
_SMALL_TENSORS = 16 << 10  # index, position and label of a batch take a page each
_IN_HAND = 2  # batches that have arrived and are being copied
_SHARE = 2  # "auto" takes at most this part of the free shared memory: validation comes beside training
_told: set[bool] = set()  # of little room: to those who left the number to us, to those who asked for one


def available_cpus() -> int:
    """Cores that this process may use: its affinity mask, and the CPU quota of its container (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no such control group on this system
    return count


def worker_count(dataset: Dataset, ranks_on_node: int | None = None) -> int:
    """Worker processes for `num_workers="auto"`.

    None for data that lies in memory: handing it over costs more than making it. Otherwise this rank's share
    of the cores, at most 8: all but one when a GPU does the training, half of them when the cores do.
    `ranks_on_node` training processes share a machine; None asks LOCAL_WORLD_SIZE, else takes 1.
    """
    if getattr(dataset, "in_memory", False):
        return 0
    cores = available_cpus() // _ranks(ranks_on_node)
    # Beside a GPU at least one: even a shared core reads while it computes.
    share = max(cores - 1, 1) if torch.cuda.is_available() else cores // 2
    return min(share, _MAX_WORKERS)


def _ranks(ranks_on_node: int | None) -> int:
    return ranks_on_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start_method() -> str | None:
    """How to start workers: "fork" while that is safe, else "forkserver"; None (the default) off Linux.

    A forked process inherits the locks that other threads hold and a CUDA context it must not touch. The fork
    server is a clean process; it needs the main script to be importable (`if __name__ == "__main__":`).
    """
    if sys.platform != "linux":
        return None
    return "forkserver" if torch.cuda.is_initialized() or threading.active_count() > 1 else "fork"


def batch_bytes(dataset: Dataset, batch_sampler: Sampler) -> int:
    """What a batch takes on its way out of a worker; 0 for data sets that do not say what a sample takes."""
    sample = getattr(dataset, "sample_bytes", 0)
    size = getattr(batch_sampler, "batch_size", 0) // getattr(batch_sampler, "world_size", 1)
    return sample * size + _SMALL_TENSORS if sample and size else 0


def needed_bytes(batch: int, workers: int, prefetch: int) -> int:
    return batch * (workers * prefetch + _IN_HAND)


def workers_that_fit(workers: int, batch: int, prefetch: int, ranks: int, share: int = _SHARE) -> int:
    """At most `workers`, so few that their batches take no more than 1 / `share` of what a process has."""
    free = free_bytes()
    if not batch or free is None:
        return workers
    return max(0, min(workers, (free // ranks // share // batch - _IN_HAND) // prefetch))


def collate(samples: dict | list[dict]) -> dict:
    """A batch of samples: tensors stacked along a new first axis, anything else as a list.

    What datasets with `__getitems__` hand over is a whole batch, which passes through.
    """
    if not isinstance(samples, list):
        return samples
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {k: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for k, v in batch.items()}


def make_loader(
    dataset: Dataset,
    batch_sampler: Sampler,
    num_workers: int | str = "auto",
    pin_memory: bool | str = "auto",
    multiprocessing_context: str | None = "auto",
    prefetch: int = 2,
    ranks_on_node: int | None = None,
    collate_fn: Callable = collate,
) -> DataLoader:
    """A DataLoader over batches of entries; what it yields does not depend on the number of workers.

    Workers hand images over as uint8 where the data set can (`compact`).

    Args:
        dataset: map-style; one of this package's, or anything whose samples are dicts.
        batch_sampler: yields lists of entries, for instance a `PositionSampler`.
        num_workers: worker processes, or "auto" (`worker_count`, as far as shared memory has room).
        pin_memory: page-locked batches for fast copies to a GPU; "auto" when there is one.
        multiprocessing_context: Python's names, None (its default) or "auto" (`start_method`).
        prefetch: batches that each worker keeps ready.
        ranks_on_node: training processes on this machine, see `worker_count`.
        collate_fn: makes a batch of a list of samples.

    Raises:
        ValueError: num_workers is neither "auto" nor a count. Iterating raises as `WorkersLoader` does.
    """
    compact = hasattr(dataset, "compact") and collate_fn is collate
    batch, ranks = batch_bytes(dataset, batch_sampler), _ranks(ranks_on_node)
    auto = num_workers == "auto"
    if auto:
        num_workers = worker_count(dataset, ranks)
    elif isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f'num_workers must be "auto" or a count of processes, got {num_workers!r}')
    fit = workers_that_fit(num_workers, batch, prefetch, ranks, _SHARE if auto else 1)
    if fit < num_workers and auto not in _told:
        _told.add(auto)
        needed = megabytes(ranks * needed_bytes(batch, num_workers, prefetch))
        said = (
            f"{num_workers} worker processes may need {needed} of shared memory, as many again in validation"
        )
        way = f"{fit} start instead" if auto else WITHOUT
        free = megabytes(free_bytes())
        logger.warning("%s, and %s has %s free: %s; %s", said, SHARED_MEMORY, free, way, MORE)
    num_workers = fit if auto else num_workers
    options = dict(
        batch_sampler=batch_sampler,
        pin_memory=torch.cuda.is_available() if pin_memory == "auto" else pin_memory,
        # Starting an iteration draws a seed for the workers; a generator of its own leaves the global one be.
        generator=torch.Generator().manual_seed(0),
    )
    if not num_workers:
        return DataLoader(dataset, collate_fn=collate_fn, **options)
    method = start_method() if multiprocessing_context == "auto" else multiprocessing_context
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["ldm.data"])
    return WorkersLoader(
        WorkerSide(dataset, collate_fn, compact),
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context=context,
        worker_init_fn=start_worker,
        persistent_workers=True,
        prefetch_factor=prefetch,
        timeout=LOOK_AFTER,
        **options,
    )
