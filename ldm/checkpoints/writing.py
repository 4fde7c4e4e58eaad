"""Files that are either whole or not there."""

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ldm.checkpoints.safetensors_files import write_stream

# A partial file that nobody has written to for so long was left by a run that was killed.
_STALE_SECONDS = 3600


def write_atomically(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its target, sync it, and rename it; until then the previous one stays.

    `writer(file)` writes to a binary file, for instance `lambda file: torch.save(state, file)`. If it raises,
    the partial file is removed and the target is as before. A run that is killed leaves `.NAME.*.partial`
    behind; a later write of the same target removes it once it is an hour old.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the disk is full or cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    _remove_stale(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with open(partial, "xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata (texts) as a .safetensors file, atomically.

    The same content gives the same bytes. Tensors that share memory are written one by one, each in full; at
    most one tensor is copied at a time.

    Raises:
        ValueError: metadata that is not text, or a tensor that the format cannot hold.
    """
    write_atomically(path, lambda file: write_stream(file, tensors, metadata))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; Windows has no such call."""
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


def _remove_stale(path: Path) -> None:
    prefix, suffix = f".{path.name}.", ".partial"
    for other in path.parent.iterdir():
        if other.name.startswith(prefix) and other.name.endswith(suffix):
            with contextlib.suppress(FileNotFoundError):  # another process may be tidying as well
                if time.time() - other.stat().st_mtime > _STALE_SECONDS:
                    other.unlink()
