"""How worker processes hand over batches: small, in memory that is surely there, errors as they were raised;
and how the main process waits for workers that may have died or may be stuck."""

import contextlib
import logging
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.images.pixels import BadImageError, normalize_pixels

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
WITHOUT = "training.workers=0 (--workers 0) works without worker processes"
MORE = "docker run --shm-size=2g or --ipc=host gives a container more"
LOOK_AFTER = 30  # seconds between two looks at whether the workers still live
_GIVE_UP_AFTER = 1800  # seconds without a batch; a slow disk has minutes
_LAST_SECONDS = 30  # that a worker lives on after a SIGTERM, unless it is ended in the ordinary way before

_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([^.]+)\.|exited)")
_END = object()


class SharedMemoryFull(OSError):
    """There is no room to hand over a batch."""


class LostWorker(ChildProcessError):
    """A worker process has ended, or does not answer."""


def free_bytes() -> int | None:
    """What is free of the shared memory; None where the system sets no limit of its own to it."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free if sys.platform == "linux" else None
    except OSError:
        return None


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def to_shared(tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor into shared memory, or raise SharedMemoryFull.

    A worker's queue would drop a batch that finds no room, and the main process wait for it for ever.
    """
    if not tensor.numel():
        return tensor
    try:
        return tensor.contiguous().share_memory_()
    except RuntimeError as error:
        if "unable to" not in str(error):  # allocate, resize or write the file that it is
            raise
        has = "" if (free := free_bytes()) is None else f", with {megabytes(free)} free,"
        raise SharedMemoryFull(
            f"the shared memory ({SHARED_MEMORY}){has} has no room for {megabytes(tensor.nbytes)} that a "
            f"worker hands over; {WITHOUT}; {MORE}"
        ) from error


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with a function applied to each tensor in its dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@dataclass
class Parcel:
    """A batch in shared memory; where `compact`, its "image" is still uint8, a quarter of the bytes."""

    batch: Any
    compact: bool

    def unpack(self) -> Any:
        """The batch in this process's own memory: what lies in the shared one is freed with the parcel."""
        own = map_tensors(torch.clone, self.batch)
        return own | {"image": normalize_pixels(own["image"])} if self.compact else own

    def pin_memory(self) -> Any:
        """For the DataLoader's pinning thread, which knows this name; it does the unpacking, too."""
        return map_tensors(torch.Tensor.pin_memory, self.unpack())


def start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers
    if hasattr(signal, "alarm"):
        # SIGTERM to all processes of a job is for the main one too; it needs its workers to finish its step.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_SECONDS))


@dataclass(eq=False)
class WorkerSide(Dataset):
    """What a worker process has of a data set: it makes whole batches, or hands over the error.

    torch would send an error as a new one whose message is the traceback: right for a bug, but it hides what
    a bad file or a full disk means. With `compact`, the data set's method of that name gives uint8 images.
    """

    dataset: Dataset
    collate_fn: Callable
    compact: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, entries: Sequence) -> Parcel | OSError | BadImageError:
        try:
            return Parcel(map_tensors(to_shared, self.collate_fn(self._samples(entries))), self.compact)
        except (BadImageError, SharedMemoryFull) as error:
            return error
        except OSError as error:  # of a plain kind: one of its subclasses need not survive pickling
            plain = (error.errno, error.strerror, error.filename) if error.errno else (str(error),)
            return OSError(*plain)

    def _samples(self, entries: Sequence) -> Any:
        if self.compact:
            return [self.dataset.compact(entry) for entry in entries]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(entries)
        return [self.dataset[entry] for entry in entries]


class WorkersLoader(DataLoader):
    """A DataLoader over a `WorkerSide`, with the `timeout` `LOOK_AFTER`; unpacks batches and raises errors.

    Raises, besides what the data set does:
        LostWorker: a worker has died, or no batch has come for half an hour.
        SharedMemoryFull: see `to_shared`.
    """

    def __iter__(self) -> Iterator[dict]:
        try:
            with clear_worker_errors():
                batches = super().__iter__()
                while (item := _next(batches)) is not _END:
                    if isinstance(item, Exception):
                        raise item
                    # The pinning thread may have unpacked it.
                    yield item.unpack() if isinstance(item, Parcel) else item
        except Exception:
            # The error's traceback holds this loader: without a word its workers would stay until the end.
            if self._iterator is not None:
                with contextlib.suppress(RuntimeError):  # one of them may be dead, which torch raises again
                    self._iterator._shutdown_workers()
                self._iterator = None
            raise


def _next(batches: Iterator[Any]) -> Any:
    began, told = time.monotonic(), False
    while True:
        try:
            return next(batches, _END)
        except (EOFError, ConnectionError) as error:  # it died while a batch was being fetched
            time.sleep(0.1)  # torch's signal handler may know how, and raises here
            raise RuntimeError("DataLoader worker (pid(s) 0) exited unexpectedly") from error
        except RuntimeError as error:  # after which the iterator goes on as if nothing had been
            if not str(error).startswith("DataLoader timed out"):
                raise
        waited = time.monotonic() - began
        if waited >= _GIVE_UP_AFTER:
            raise LostWorker(f"no image has come from the workers for {waited / 60:.0f} minutes; {WITHOUT}")
        if not told:
            logger.warning("waiting for images for %.0f s now: the disk or the network is slow", waited)
        told = True


@contextlib.contextmanager
def clear_worker_errors() -> Iterator[None]:
    """Turn torch's words for a worker's death into a LostWorker.

    A signal handler of torch's raises them wherever the main process is at that moment, so this belongs
    around all that runs while workers do.
    """
    try:
        yield
    except RuntimeError as error:
        deaths = [found for found in map(_DEATH.search, _texts(error)) if found]
        if not deaths:
            raise
        signals = [death[1].lower() for death in deaths if death[1]]
        cause = f" ({signals[0]})" if signals else ""
        why = "is the machine, container or job out of memory? training.workers=N (--workers N) sets how many"
        if "bus error" in cause:
            why = f"the shared memory is full: {WITHOUT}; {MORE}"
        raise LostWorker(f"a worker process that reads images ended unexpectedly{cause}: {why}") from error


def _texts(error: BaseException | None) -> Iterator[str]:
    """Messages of an error and of those that it came from; torch may hang the signal's to another."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__
