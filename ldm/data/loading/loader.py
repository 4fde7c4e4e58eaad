"""The DataLoader that suits the machine."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.loading.shared_memory import batch_bytes, warn_unless_fitting, workers_that_fit
from ldm.data.loading.transport import WorkerSide, as_it_is, open_parcel
from ldm.data.loading.waiting import LOOK_AFTER, received

_MAX_WORKERS = 8
_LAST_SECONDS = 30  # that a worker lives on after a SIGTERM, unless it is ended in the ordinary way before


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

    Args:
        dataset: one with `in_memory` true needs no workers.
        ranks_on_node: training processes on this machine; None asks LOCAL_WORLD_SIZE, else takes 1.
    """
    if getattr(dataset, "in_memory", False):
        return 0
    cores = available_cpus() // _ranks(ranks_on_node)
    share = cores - 1 if torch.cuda.is_available() else cores // 2
    if torch.cuda.is_available():
        share = max(share, 1)  # even a shared core reads while the GPU computes
    return min(share, _MAX_WORKERS)


def _ranks(ranks_on_node: int | None) -> int:
    return ranks_on_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start_method() -> str | None:
    """How to start workers: "fork" while that is safe, else "forkserver", the platform's way elsewhere
    (None).

    A forked process inherits the locks that other threads hold and a CUDA context it must not touch. The fork
    server is a clean process that has the imports done, so it starts workers nearly as fast; it needs the
    main script to be importable (`if __name__ == "__main__":`).
    """
    if sys.platform != "linux":
        return None
    return "forkserver" if torch.cuda.is_initialized() or threading.active_count() > 1 else "fork"


def collate(samples: dict | list[dict]) -> dict:
    """A batch of samples: tensors stacked along a new first axis, anything else as a list.

    Datasets with `__getitems__` hand over whole batches, which pass through.
    """
    if isinstance(samples, dict):
        return samples
    return {
        key: torch.stack([sample[key] for sample in samples])
        if isinstance(value, torch.Tensor)
        else [sample[key] for sample in samples]
        for key, value in samples[0].items()
    }


def _start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers
    if hasattr(signal, "alarm"):
        # SIGTERM to all processes of a job is for the main one too; it needs its workers to finish its step.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_SECONDS))


class _WorkersLoader(DataLoader):
    """A DataLoader over a `WorkerSide`: its batches are unpacked here, its errors are raised here."""

    def __iter__(self) -> Iterator[dict]:
        try:
            for parcel in received(super().__iter__()):
                yield open_parcel(parcel)
        except Exception:
            # The error's traceback holds this loader: without a word its workers would stay until the end.
            if self._iterator is not None:
                with contextlib.suppress(RuntimeError):  # one of them may be dead, which torch raises again
                    self._iterator._shutdown_workers()
                self._iterator = None
            raise


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

    Workers hand images over as uint8 where the data set can (`compact`), and "auto" takes no more of them
    than the shared memory has room for; see `ldm.data.loading.shared_memory`, `transport` and `waiting`.

    Args:
        dataset: map-style; one of this package's, or anything whose samples are dicts.
        batch_sampler: yields lists of entries, for instance a `PositionSampler`.
        num_workers: worker processes, or "auto" (see `worker_count`).
        pin_memory: page-locked batches for fast copies to a GPU; "auto" when there is one.
        multiprocessing_context: "fork", "spawn", "forkserver", None (Python's default) or "auto"
            (`start_method`).
        prefetch: batches that each worker keeps ready.
        ranks_on_node: training processes on this machine, for "auto".
        collate_fn: makes a batch of a list of samples.

    Raises:
        ValueError: num_workers is neither "auto" nor a count.

    Iterating raises, besides what the data set does:
        SharedMemoryFull, LostWorker: (OSErrors) see there.
    """
    compact = hasattr(dataset, "compact") and collate_fn is collate
    batch, ranks = batch_bytes(dataset, batch_sampler), _ranks(ranks_on_node)
    if num_workers == "auto":
        num_workers = workers_that_fit(worker_count(dataset, ranks), batch, prefetch, ranks)
    elif isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f'num_workers must be "auto" or a count of processes, got {num_workers!r}')
    else:
        warn_unless_fitting(num_workers, batch, prefetch, ranks)
    workers: dict = {}
    if num_workers:
        dataset, collate_fn = WorkerSide(dataset, collate_fn, compact), as_it_is
        method = start_method() if multiprocessing_context == "auto" else multiprocessing_context
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["ldm.data"])
        workers = dict(
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            persistent_workers=True,
            prefetch_factor=prefetch,
            timeout=LOOK_AFTER,
        )
    return (_WorkersLoader if num_workers else DataLoader)(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available() if pin_memory == "auto" else pin_memory,
        # Starting an iteration draws a seed for the workers; a generator of its own leaves the global one
        # alone.
        generator=torch.Generator().manual_seed(0),
        **workers,
    )
