"""Writing: a whole file or folder, or none; one writer at a time."""

import contextlib
import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# A partial file that nobody has written to for so long was left by a process that was killed.
_STALE_SECONDS = 3600
_UNIQUE = re.compile(r"\.(tmp|old)-\d+-[0-9a-f]{8}")


class CannotWrite(OSError):
    """A file cannot be written: says which, why, and what to do."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes its name when it is complete; until then the previous one stays.

    After an error nothing of it is left. A killed process leaves `.NAME.*.partial`; a later durable write of
    the same name removes it once it is an hour old. A `durable` file survives a power cut too: it waits for
    the disk, which thousands of images should not.

    Raises:
        FileNotFoundError, IsADirectoryError: the folder is not there, or `path` is one.
        CannotWrite: the disk is full or read-only, or the folder not ours.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if durable:
        _remove_stale(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if _is_of_file(error, partial):
            remedy = "free some space" if error.errno in _FULL else "choose another folder"
            raise CannotWrite(f"cannot write {path} ({os.strerror(error.errno)}); {remedy}") from error
        raise
    if durable:
        sync_folder(path.parent)


def _is_of_file(error: BaseException, path: Path) -> bool:
    """Whether the system refused to write this file; errors of a write do not name it."""
    if not isinstance(error, OSError) or isinstance(error, CannotWrite | BrokenPipeError):
        return False
    return error.filename == str(path) or (error.filename is None and error.errno in (*_FULL, errno.EIO))


def _remove_stale(path: Path) -> None:
    for other in path.parent.iterdir():
        if other.name.startswith(f".{path.name}.") and other.name.endswith(".partial"):
            with contextlib.suppress(FileNotFoundError):  # another process may be tidying as well
                if time.time() - other.stat().st_mtime > _STALE_SECONDS:
                    other.unlink()


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill: it takes the place of `target` when the block ends, or vanishes if that fails."""
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh = target.with_name(f"{target.name}.tmp-{unique}")
    stale = target.with_name(f"{target.name}.old-{unique}")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        sync_folder(fresh)
        _swap(fresh, target, stale)
        sync_folder(target.parent)
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


def remove_leftovers(target: Path) -> None:
    """Delete what killed writers of the folder `target` left beside it; only under its lock."""
    for path in target.parent.iterdir():
        if path.name.startswith(target.name) and _UNIQUE.fullmatch(path.name[len(target.name) :]):
            log.info("removing %s, left by a process that did not finish", path)
            shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


class Busy(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path`, made where there is none; gives whether the system really has such a lock.

    The kernel lets go of it when the process ends, however it ends. `wait` waits for whoever has it; without,
    that raises Busy, a ValueError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        yield _lock(file, path, wait)


def _lock(file, path: Path, wait: bool) -> bool:
    if fcntl is None:
        return False
    # Who does not wait holds it for hours: a record lock is not handed on to data-loading workers, who may
    # outlive a killed process by some seconds. Who waits may be another thread, to which only flock's holds.
    lock = fcntl.flock if wait else fcntl.lockf
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            raise Busy(f"another process holds {path}") from None
        log.info("waiting for another process, which holds %s", path)
        lock(file, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("no file locks at %s (%s): do not start the same thing twice", path.parent, error)
        return False
    return True


def check_space(folder: Path, needed: int, advice: str) -> None:
    """ValueError with the numbers when `folder`'s disk has not `needed` bytes and some air."""
    free = shutil.disk_usage(folder).free
    if needed + (64 << 20) > free:
        gigabytes = f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise ValueError(f"not enough space at {folder}: {gigabytes}. {advice}")
