"""What a cache on disk needs from the file system: one writer at a time, shards, whole or not there."""

import contextlib
import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_UNIQUE = re.compile(r"\.(tmp|old)-\d+-[0-9a-f]{8}")


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[bool]:
    """Hold the lock file beside `target`, waiting for whoever has it; gives whether there is a real lock.

    The kernel lets go of the lock when its process ends, however it ends. Where the system or the file system
    has no such locks this gives False, and two builders at once each do the work; the last rename wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as file:
        locked = _lock(file, target)
        try:
            yield locked
        finally:
            if locked:
                fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file, target: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("another process is building %s: waiting for it", target)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning(
            "no file locks at %s (%s): do not start two runs that build it at once", target.parent, error
        )
        return False
    return True


def remove_leftovers(target: Path) -> None:
    """Delete what builders that were killed left beside `target`; only under its lock."""
    for path in target.parent.iterdir():
        if path.name.startswith(target.name) and _UNIQUE.fullmatch(path.name[len(target.name) :]):
            logger.info("removing %s, left by a build that did not finish", path)
            shutil.rmtree(path)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to fill: it takes the place of `target` when the block ends, or vanishes if that fails."""
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh = target.with_name(f"{target.name}.tmp-{unique}")
    stale = target.with_name(f"{target.name}.old-{unique}")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        _sync_folder(fresh)
        _swap(fresh, target, stale)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def _swap(fresh: Path, target: Path, stale: Path) -> None:
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError):  # gone: someone without a lock was quicker
            os.rename(target, stale)
        try:
            os.rename(fresh, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(stale, ignore_errors=True)  # someone put theirs in between: once more
    raise ValueError(f"{target} keeps being replaced by other processes")


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_space(folder: Path, needed: int, advice: str) -> None:
    """ValueError with the numbers when `folder`'s disk has not `needed` bytes and some air."""
    free = shutil.disk_usage(folder).free
    if needed + (64 << 20) > free:
        raise ValueError(
            f"not enough space at {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free. {advice}"
        )


class ShardWriter:
    """Rows of one shape and type, appended to numbered .npy files of bounded size.

    The files are written as streams rather than through memory maps: on a full disk a write fails with a
    message, a store into a map kills the process.

    Args:
        folder: where shard-00000.npy and so on go.
        count: rows in all, known beforehand.
        row_shape, dtype: of a row.
        shard_bytes: a shard has as many whole rows as fit, at least one.
    """

    def __init__(
        self, folder: Path, count: int, row_shape: tuple[int, ...], dtype: np.dtype, shard_bytes: int
    ):
        self.folder, self.count, self.row_shape, self.dtype = folder, count, row_shape, np.dtype(dtype)
        self.rows_per_shard = max(1, shard_bytes // (int(np.prod(row_shape)) * self.dtype.itemsize))
        self.written = 0
        self.files: list[str] = []
        self._file = None

    def append(self, rows: np.ndarray) -> None:
        """Add rows (n, *row_shape)."""
        while len(rows):
            room = self.rows_per_shard - self.written % self.rows_per_shard
            if self._file is None:
                self._open()
            part, rows = rows[:room], rows[room:]
            self._file.write(np.ascontiguousarray(part, dtype=self.dtype).tobytes())
            self.written += len(part)
            if self.written % self.rows_per_shard == 0:
                self.close()

    def _open(self) -> None:
        name = f"shard-{len(self.files):05d}.npy"
        rows = min(self.rows_per_shard, self.count - self.written)
        self._file = open(self.folder / name, "wb")  # noqa: SIM115 - lives until close()
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        self.files.append(name)

    def close(self) -> None:
        """Finish the current shard."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
