"""Waiting for worker processes that may have died or may be stuck."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldm.data.loading.shared_memory import MORE

logger = logging.getLogger(__name__)

LOOK_AFTER = 30  # seconds between two looks at whether the workers still live
GIVE_UP_AFTER = 1800  # seconds without a batch; a slow disk has minutes

_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([^.]+)\.|exited)")
_END = object()


class LostWorker(ChildProcessError):
    """A worker process has ended, or does not answer."""


@contextmanager
def clear_worker_errors() -> Iterator[None]:
    """Turn torch's words for a worker's death into one sentence.

    A signal handler of torch's raises them wherever the main process is at that moment, so this belongs
    around all that runs while workers do.

    Raises:
        LostWorker: a worker has died.
    """
    try:
        yield
    except RuntimeError as error:
        deaths = [found for found in map(_DEATH.search, _texts(error)) if found]
        if not deaths:
            raise
        signals = [death[1].lower() for death in deaths if death[1]]
        cause = f" ({signals[0]})" if signals else ""
        if "bus error" in cause:
            advice = f"The shared memory is full: training.workers=0 (--workers 0) works without it; {MORE}"
        else:
            advice = (
                "Mostly that is the system, out of memory (of the machine, its container or its job): fewer "
                "of them (training.workers=N, --workers N) take less"
            )
        raise LostWorker(f"a worker process that reads images ended unexpectedly{cause}. {advice}") from error


def received(batches: Iterator[Any]) -> Iterator[Any]:
    """The items of a DataLoader whose `timeout` is `LOOK_AFTER`, with a word when they are late.

    Raises:
        LostWorker: a worker has died, or no batch has come for `GIVE_UP_AFTER` seconds.
    """
    with clear_worker_errors():
        while (item := _next(batches)) is not _END:
            yield item


def _texts(error: BaseException | None) -> Iterator[str]:
    """Messages of an error and of those that it came from; torch may hang the signal's to another."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


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
        if waited >= GIVE_UP_AFTER:
            raise LostWorker(
                f"no image has come from the worker processes for {waited / 60:.0f} minutes: is the disk or "
                "the network that holds them stuck? training.workers=0 (--workers 0) reads without such "
                "processes"
            )
        if not told:
            told = True
            logger.warning("waiting for images for %.0f s now: the disk or the network is slow", waited)
