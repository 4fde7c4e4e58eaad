"""Finding the images under a folder."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ldm.data.latents.strings import StringTable
from ldm.wording import counted, some

logger = logging.getLogger(__name__)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_PROGRESS_SECONDS = 5.0


@dataclass
class Scan:
    """What a folder holds. Paths are relative to the root with "/" between parts, sorted by their bytes."""

    root: str
    paths: StringTable
    sizes: np.ndarray  # int64, bytes
    mtimes: np.ndarray  # int64, nanoseconds
    empty: list[str] = field(default_factory=list)  # images of zero bytes
    other: Counter = field(default_factory=Counter)  # extension -> number of files that are no images
    hidden: int = 0  # files and folders whose name starts with a dot
    broken_links: list[str] = field(default_factory=list)  # or sockets, pipes, ... named like images
    repeated_folders: list[str] = field(default_factory=list)  # links to a folder that is read anyway
    closed_folders: list[str] = field(default_factory=list)  # folders that may not be read
    folders: int = 0
    loose: int = 0  # images beside class folders, left out by layout="classes"

    def ignored(self) -> str:
        """What was left out, in words; empty when nothing was."""
        parts = []
        if self.loose:
            parts.append(f"{counted(self.loose, 'image')} beside the class folders")
        if self.other:
            kinds = ", ".join(f"{ext or 'no extension'} {count}" for ext, count in self.other.most_common(5))
            count = self.other.total()
            parts.append(f"{counted(count, 'file of another kind', 'files of other kinds')} ({kinds})")
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        for names, *words in (
            (self.empty, "empty file"),
            (self.broken_links, "broken link or special file", "broken links or special files"),
            (
                self.repeated_folders,
                "link to a folder that is read already",
                "links to folders that are read already",
            ),
            (self.closed_folders, "folder that may not be read", "folders that may not be read"),
        ):
            if names:
                parts.append(f"{counted(len(names), *words)} ({some(names)})")
        return ", ".join(parts)


def parse_extensions(extensions: Iterable[str]) -> tuple[str, ...]:
    if isinstance(extensions, str):
        raise ValueError(f"extensions must be a list, got the string {extensions!r}")
    return tuple(sorted({"." + e.lower().lstrip(".") for e in extensions}))


def scan_folder(root: str, extensions: Iterable[str] = EXTENSIONS) -> Scan:
    """List the images under `root`, in all subfolders.

    Links are followed. Every folder is read once, by its own path rather than through a link where it has one
    below the root, so that loops end and no image is listed twice. Nothing is opened: a million files take
    the time of a million `stat` calls. Progress goes to the log every few seconds.

    Raises:
        ValueError: `root` is missing or no folder, or holds no image; says what was looked for and what was
            found.
    """
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"image folder {root} {what}")
    extensions = parse_extensions(extensions)
    result = Scan(root, StringTable.from_bytes([]), np.empty(0, np.int64), np.empty(0, np.int64))
    records: list[tuple[bytes, int, int]] = []
    visited: set[tuple[int, int]] = set()
    folders, links = [""], []  # real folders first, links when these are done
    logged = time.monotonic()
    while folders or links:
        if not folders:
            links.sort()  # in order of their paths, whatever order the disk gives
            folders.append(links.pop(0))
        relative = folders.pop()
        full = os.path.join(root, relative)
        try:
            status = os.stat(full)
            identity = (status.st_dev, status.st_ino)
            if identity in visited:
                result.repeated_folders.append(relative)
                continue
            visited.add(identity)
            with os.scandir(full) as entries:
                _read_folder(relative, entries, extensions, result, records, folders, links)
        except PermissionError:
            result.closed_folders.append(relative)
        if time.monotonic() - logged > _PROGRESS_SECONDS:
            logged = time.monotonic()
            found = f"{counted(len(records), 'image')} in {counted(len(visited), 'folder')}"
            logger.info("scanning %s: %s so far", root, found)
    records.sort()
    result.folders = len(visited)
    result.paths = StringTable.from_bytes(path for path, _, _ in records)
    result.sizes = np.array([size for _, size, _ in records], dtype=np.int64)
    result.mtimes = np.array([mtime for _, _, mtime in records], dtype=np.int64)
    for names in (result.empty, result.broken_links, result.repeated_folders, result.closed_folders):
        names.sort()
    if not records:
        found = result.ignored() or "nothing"
        raise ValueError(
            f"no images under {root}: looked for {', '.join(extensions)} in "
            f"{counted(result.folders, 'folder')}, "
            f"found {found}"
        )
    return result


def _read_folder(relative, entries, extensions, result, records, folders, links) -> None:
    for entry in entries:
        path = f"{relative}/{entry.name}" if relative else entry.name
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            result.hidden += 1
        elif entry.is_dir():
            (links if entry.is_symlink() else folders).append(path)
        elif extension not in extensions:
            result.other[extension] += 1
        elif not entry.is_file():
            result.broken_links.append(path)
        else:
            status = entry.stat()
            if status.st_size:
                records.append((os.fsencode(path), status.st_size, status.st_mtime_ns))
            else:
                result.empty.append(path)


def assign_classes(scan: Scan, layout: str) -> tuple[list[str] | None, np.ndarray | None]:
    """Names of the classes, sorted, and the label of each path, int64 (N,); (None, None) for a set without
    classes.

    The class of a path is its first part. With layout "classes", loose images are removed from `scan`; with
    "auto", loose images beside subfolders make the whole a set without classes, and the log says so.

    Raises:
        ValueError: layout "classes" without any image in a subfolder.
    """
    if layout == "flat":
        return None, None
    firsts = [_first_part(scan.paths.bytes_at(i)) for i in range(len(scan.paths))]
    names = sorted(set(firsts) - {b""})
    loose = np.array([not first for first in firsts])
    if layout == "auto" and loose.any():
        if names:
            logger.warning(
                "%s holds both loose images (%d) and subfolders with images (%d): all are used, without "
                'classes. For one class a subfolder, without the loose images, set layout="classes"; '
                'layout="flat" keeps this reading and ends the warning.',
                scan.root,
                loose.sum(),
                len(names),
            )
        return None, None
    if not names:
        raise ValueError(f'layout="classes" needs one subfolder a class, {scan.root} has only loose images')
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[first] for first in firsts if first], dtype=np.int64)
    if loose.any():
        kept = np.flatnonzero(~loose)
        scan.paths, scan.sizes, scan.mtimes = scan.paths.select(kept), scan.sizes[kept], scan.mtimes[kept]
        scan.loose = int(loose.sum())
    classes = [os.fsdecode(name) for name in names]
    if {name.lower() for name in classes} <= {"train", "training", "val", "valid", "validation", "test"}:
        logger.warning(
            "the classes of %s are called %s, like the parts of a dataset: set root to one of them if that "
            "is what they are.",
            scan.root,
            some(classes),
        )
    return classes, labels


def _first_part(path: bytes) -> bytes:
    first, slash, _ = path.partition(b"/")
    return first if slash else b""
