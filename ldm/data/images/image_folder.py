"""A folder of images as a dataset."""

import logging
import math
import os
import shlex

import numpy as np
import torch

from ldm.data.images.dataset import Entry, ImageDataset, fingerprint_of, parse_entries
from ldm.data.images.pixels import (
    MAX_PIXELS,
    BadImageError,
    cut_square,
    normalize_pixels,
    parse_background,
    read_image,
    square_box,
    to_pixels,
)
from ldm.data.images.scan import EXTENSIONS, assign_classes, scan_folder
from ldm.data.loading.order import flip_mask, hash64
from ldm.data.loading.workers import to_shared
from ldm.wording import counted, some

logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 20


class ImageFolder(ImageDataset):
    """All images under a folder, with one class a subfolder; samples as in `ImageDataset`.

    Subfolders are read to any depth; the first part of the path names the class, classes are sorted by name.
    A folder that holds both loose images and subfolders with images is taken as one set without classes, with
    a warning; `layout="classes"` leaves the loose images out instead. `summary()` counts what was ignored.

    Any mode becomes 8-bit RGB: the first frame of an animation, turned upright by EXIF, transparency over
    `background`, 16 bits scaled down; colour profiles are not applied. Images smaller than `size` are
    enlarged, with one warning and a count.

    Args:
        root: the folder; `~` is understood.
        size: pixels of a side.
        crop: "center" or "random" (see `pixels.square_box`); the plain view is always the centre.
        crop_scale: least and largest share of the shorter side that a random crop keeps.
        flip: mirror half of the samples.
        background: what shows through transparent parts, three integers in 0..255 or a colour name.
        channels: 3, or 1 for grey.
        validation: share in [0, 1) or number of images that `split("validation")` gets. A file's part is a
            function of its path below root, so adding files moves no other (with a number, few).
        layout: "auto", "flat" (no classes) or "classes".
        on_error: "raise" stops at an unreadable file; "report" warns of it once, counts it, and takes another
            image in its place, the same one each time.
        max_pixels: refuse to decode larger images.
        extensions: endings of file names that are images.

    Attributes:
        scan: what the search of the folder found and left out.

    Raises:
        ValueError: on a missing or empty folder, a bad argument, or empty files with on_error="raise".
    """

    def __init__(
        self,
        root: str | os.PathLike,
        size: int,
        crop: str = "center",
        crop_scale: tuple[float, float] = (0.8, 1.0),
        flip: bool = False,
        background: str | tuple[int, int, int] = (255, 255, 255),
        channels: int = 3,
        validation: float | int = 0.02,
        layout: str = "auto",
        on_error: str = "raise",
        max_pixels: int = MAX_PIXELS,
        extensions: tuple[str, ...] = EXTENSIONS,
    ):
        # Bad arguments show before the folder is read.
        for name, value, allowed in (
            ("crop", crop, ("center", "random")),
            ("layout", layout, ("auto", "flat", "classes")),
            ("on_error", on_error, ("raise", "report")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two shares, 0 < least <= largest <= 1, got {crop_scale!r}")
        super().__init__(0, size, channels, flip, validation)
        self.crop, self.crop_scale = crop, tuple(crop_scale)
        self.background = parse_background(background)
        self.on_error, self.max_pixels = on_error, max_pixels
        self.scan = scan_folder(os.fspath(root), extensions)
        if self.scan.empty and on_error == "raise":
            count = counted(len(self.scan.empty), "empty image file")
            raise ValueError(f"{self.root} has {count}: {some(self.scan.empty)}; {self._ways_out()}")
        self.classes, self._labels = assign_classes(self.scan, layout)
        self._names = self.scan.paths
        self.rows = np.arange(len(self._names))
        # Shared with worker processes: one byte a file, set and never cleared, so nobody has to lock.
        self._bad, self._enlarged = (
            to_shared(torch.zeros(len(self.rows), dtype=torch.uint8)) for _ in range(2)
        )
        left_out = self.scan.empty or self.scan.closed_folders
        logger.log(logging.WARNING if left_out else logging.INFO, "%s", self.summary())

    @property
    def root(self) -> str:
        return self.scan.root

    def path(self, index: int) -> str:
        """The file of a sample."""
        return self._full_path(self.rows[index])

    def _full_path(self, row: int) -> str:
        return self.scan.full(self.scan.paths[int(row)])

    def empty_files(self) -> list[str]:
        """Image files of zero bytes; they are not among the samples."""
        return [self.scan.full(path) for path in self.scan.empty]

    def bad_files(self) -> list[str]:
        """Files that turned out unreadable so far, in all worker processes and parts, empty ones included."""
        return sorted(
            self.empty_files() + [self._full_path(row) for row in np.flatnonzero(self._bad.numpy())]
        )

    @property
    def enlarged(self) -> int:
        """How many images smaller than `size` have been enlarged so far."""
        return int(np.count_nonzero(self._enlarged.numpy()))

    def summary(self) -> str:
        """One line: what is there, what was ignored, what turned out bad."""
        classes, ignored, bad = self.classes or [], self.scan.ignored(), self.bad_files()
        parts = [
            f" for {self.part}" if self.part != "all" else "",
            f" in {counted(len(classes), 'class', 'classes')} ({some(classes)})" if classes else "",
            f"; ignored {ignored}" if ignored else "",
            f"; {len(bad)} unreadable ({some(bad)})" if bad else "",
            f"; {self.enlarged:,} smaller than {self.size} pixels enlarged" if self.enlarged else "",
        ]
        return f"{self.root}: {counted(len(self), 'image')}" + "".join(parts)

    def fingerprint(self) -> str:
        options = {name: getattr(self, name) for name in ("size", "channels", "crop", "background")}
        options |= {"kind": "ImageFolder", "version": 1}
        options["crop_scale"] = self.crop_scale if self.crop == "random" else None
        options["classes"] = [os.fsencode(name).hex() for name in self.classes] if self.classes else None
        paths, sizes, mtimes = self.scan.paths, self.scan.sizes, self.scan.mtimes
        return fingerprint_of(options, paths.buffer, paths.offsets, sizes, mtimes, self.rows)

    @property
    def sample_bytes(self) -> int:
        return super().sample_bytes // torch.float32.itemsize

    def __getitem__(self, entry: Entry) -> dict[str, torch.Tensor]:
        sample = self.compact(entry)
        return {**sample, "image": normalize_pixels(sample["image"])}

    def compact(self, entry: Entry) -> dict[str, torch.Tensor]:
        """A sample whose image is uint8 (C, H, W), a quarter of the bytes; see `normalize_pixels`."""
        indices, positions = parse_entries([entry], len(self))
        position = int(positions[0])
        image, index = self._pixels_or_replacement(int(indices[0]), position)
        if self.flip and flip_mask(self.seed, positions)[0]:
            image = image.flip(-1)
        sample = {"image": image, "index": torch.tensor(index), "position": torch.tensor(position)}
        if self._labels is not None:
            sample["label"] = torch.tensor(int(self._labels[self.rows[index]]))
        return sample

    def _pixels_or_replacement(self, index: int, position: int) -> tuple[torch.Tensor, int]:
        first = index
        for attempt in range(_MAX_REPLACEMENTS):
            row = int(self.rows[index])
            try:
                return self._pixels(row, position), index
            except BadImageError as error:
                if self.on_error == "raise":
                    raise BadImageError(f"{error}; {self._ways_out()}") from error
                self._report_bad(row, error)
            index = int(hash64(0, "replacement", first, attempt)[0] % np.uint64(len(self)))
        last = self._full_path(row)
        raise BadImageError(f"no readable image in {_MAX_REPLACEMENTS} tries under {self.root}, last {last}")

    def _pixels(self, row: int, position: int) -> torch.Tensor:
        """uint8 (channels, size, size) of a file."""
        path = self._full_path(row)
        least = self.crop_scale[0] if self.crop == "random" and position >= 0 else 1.0
        decoded = read_image(path, shrink_to=math.ceil(self.size / least), max_pixels=self.max_pixels)
        if min(decoded.size) < self.size:
            self._report_enlarged(row, decoded.size)
        box = square_box(*decoded.size, self.size, self.crop, self.crop_scale, self.seed, position)
        try:
            return to_pixels(cut_square(decoded, box, self.size, self.background), self.channels)
        except ValueError as error:
            raise BadImageError(f"{path}: {error}") from error

    def _report_bad(self, row: int, error: BadImageError) -> None:
        if not self._bad[row]:
            self._bad[row] = 1
            count = np.count_nonzero(self._bad.numpy())
            logger.warning("unreadable image %d of this run, another takes its place: %s", count, error)

    def _report_enlarged(self, row: int, size: tuple[int, int]) -> None:
        if not self._enlarged.numpy().any():
            said = "%s is %dx%d, smaller than size=%d, and is enlarged, as are others like it (told once)"
            logger.warning(said, self._full_path(row), *size, self.size)
        self._enlarged[row] = 1

    def _ways_out(self) -> str:
        verify = f"`ldm verify {shlex.quote(self.root)}`"
        return f"{verify} lists all such files; data.params.on_error=report goes on without them"
