"""Finding the images under a folder."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ldm.data.images.dataset import StringTable
from ldm.wording import counted, some

logger = logging.getLogger(__name__)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_PROGRESS_SECONDS = 5.0
_PARTS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass
class Scan:
    """What a folder holds. Paths are relative to the root with "/" between parts, sorted by their bytes."""

    root: str
    paths: StringTable = field(default_factory=lambda: StringTable.from_bytes([]))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # bytes
    mtimes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # nanoseconds
    empty: list[str] = field(default_factory=list)  # images of zero bytes
    broken_links: list[str] = field(default_factory=list)  # or sockets, pipes, ... named like images
    repeated_folders: list[str] = field(default_factory=list)  # links to a folder that is read anyway
    closed_folders: list[str] = field(default_factory=list)  # folders that may not be read
    other: Counter = field(default_factory=Counter)  # extension -> number of files that are no images
    hidden: int = 0  # files and folders whose name starts with a dot
    loose: int = 0  # images beside class folders, left out by layout="classes"

    def full(self, path: str) -> str:
        return os.path.join(self.root, *path.split("/"))

    def unreadable(self) -> dict[str, list[str]]:
        """The paths of what cannot be read, by what is wrong with it."""
        return {
            "empty file": self.empty,
            "broken link": self.broken_links,
            "repeated folder": self.repeated_folders,
            "closed folder": self.closed_folders,
        }

    def ignored(self) -> str:
        """What was left out, in words; empty when nothing was."""
        kinds = ", ".join(f"{ext or 'no extension'} {count}" for ext, count in self.other.most_common(5))
        others = counted(self.other.total(), "file of another kind", "files of other kinds")
        parts = [
            f"{counted(self.loose, 'image')} beside the class folders" if self.loose else "",
            f"{others} ({kinds})" if self.other else "",
            f"{self.hidden} hidden" if self.hidden else "",
            *(f"{counted(len(p), what)} ({some(p)})" for what, p in self.unreadable().items() if p),
        ]
        return ", ".join(filter(None, parts))


def scan_folder(root: str, extensions: Iterable[str] = EXTENSIONS) -> Scan:
    """List the images under `root`, in all subfolders; nothing is opened.

    Links are followed. Every folder is read once, by its own path rather than through a link where it has one
    below the root, so that loops end and no image is listed twice.

    Raises:
        ValueError: `root` is missing or no folder, or holds no image; says what was looked for and found.
    """
    if isinstance(extensions, str):
        raise ValueError(f"extensions must be a list, got the string {extensions!r}")
    extensions = sorted({"." + extension.lower().lstrip(".") for extension in extensions})
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"image folder {root} {what}")
    scan = Scan(root)
    records: list[tuple[bytes, int, int]] = []  # path, bytes, nanoseconds
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
                scan.repeated_folders.append(relative)
                continue
            visited.add(identity)
            with os.scandir(full) as entries:
                for path, entry in _sorted_out(relative, entries, extensions, scan):
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                    elif (status := entry.stat()).st_size:
                        records.append((os.fsencode(path), status.st_size, status.st_mtime_ns))
                    else:
                        scan.empty.append(path)
        except PermissionError:
            scan.closed_folders.append(relative)
        if time.monotonic() - logged > _PROGRESS_SECONDS:
            logged = time.monotonic()
            found = f"{counted(len(records), 'image')} in {counted(len(visited), 'folder')}"
            logger.info("scanning %s: %s so far", root, found)
    for names in (records, *scan.unreadable().values()):
        names.sort()
    if not records:
        raise ValueError(
            f"no images under {root}: looked for {', '.join(extensions)} in "
            f"{counted(len(visited), 'folder')}, found {scan.ignored() or 'nothing'}"
        )
    paths, sizes, mtimes = zip(*records, strict=True)
    scan.paths = StringTable.from_bytes(paths)
    scan.sizes, scan.mtimes = np.array(sizes, dtype=np.int64), np.array(mtimes, dtype=np.int64)
    return scan


def _sorted_out(
    relative: str, entries: Iterable[os.DirEntry], extensions: list[str], scan: Scan
) -> Iterator[tuple[str, os.DirEntry]]:
    """The folders and image files of a folder, with their paths; the rest is noted in `scan`."""
    for entry in entries:
        path = f"{relative}/{entry.name}" if relative else entry.name
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            scan.hidden += 1
        elif entry.is_dir():
            yield path, entry
        elif extension not in extensions:
            scan.other[extension] += 1
        elif not entry.is_file():
            scan.broken_links.append(path)
        else:
            yield path, entry


def assign_classes(scan: Scan, layout: str) -> tuple[list[str] | None, np.ndarray | None]:
    """Names of the classes, sorted, and the label of each path, int64 (N,); None, None without classes.

    The class of a path is its first part. With layout "classes", loose images are removed from `scan` (and
    ValueError raised where there are no others); with "auto", they make the whole a set without classes.
    """
    if layout == "flat":
        return None, None
    folders = (scan.paths.bytes_at(i).rpartition(b"/")[0] for i in range(len(scan.paths)))
    firsts = [folder.split(b"/")[0] for folder in folders]
    names = sorted(set(firsts) - {b""})
    loose = np.array([not first for first in firsts])
    if layout == "auto" and loose.any():
        if names:
            both = f"both loose images ({loose.sum()}) and subfolders with images ({len(names)})"
            ways = 'layout="classes" leaves the loose images out, layout="flat" ends this warning'
            logger.warning("%s holds %s: all are used, without classes; %s", scan.root, both, ways)
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
    if {name.lower() for name in classes} <= _PARTS:
        said = "the classes of %s are called %s, like the parts of a dataset: is one of them the root?"
        logger.warning(said, scan.root, some(classes))
    return classes, labels
