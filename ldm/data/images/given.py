"""Images that are given to a model: found, cut as training images are, named where they cannot be read."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.images.pixels import cut_square, read_image, square_box, to_pixels
from ldm.data.images.scan import scan_folder
from ldm.data.loading.loader import make_loader
from ldm.data.loading.order import SequentialBatches
from ldm.wording import did_you_mean

log = logging.getLogger(__name__)

FEW = 64  # images that one process reads faster than others start


def find_images(images: Path) -> tuple[Path, list[str], list[tuple[str, str]]]:
    """(folder, paths below it with "/" between parts, what cannot be read and why)."""
    if images.is_file():
        return images.parent, [images.name], []
    if not images.exists():
        beside = [path.name for path in images.parent.iterdir()] if images.parent.is_dir() else []
        hint = did_you_mean(images.name, beside, "" if images.parent == Path() else f"{images.parent}/")
        raise FileNotFoundError(f"{images} does not exist{hint}")
    scan = scan_folder(str(images))
    found = scan.unreadable() | {"repeated folder": []}  # which is read, by its other name
    unreadable = [(path, what) for what, paths in found.items() for path in paths]
    if scan.ignored():
        log.info("%s: %d images; ignored %s", images, len(scan.paths), scan.ignored())
    return images, [scan.paths[i] for i in range(len(scan.paths))], unreadable


@dataclass(eq=False)
class Pictures(Dataset):
    """Files as training sees them in its plain view: upright, the centre, resized; uint8 (C, size, size).

    folder, paths, unreadable: from `find_images`; `batches` adds to the last what it cannot read.
    """

    folder: Path
    paths: list[str]
    unreadable: list[tuple[str, str]]
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, *self.paths[index].split("/"))

    def pixels(self, index: int) -> Tensor:
        """uint8 (C, size, size); ValueError where the file cannot be read."""
        decoded = read_image(self.path(index), shrink_to=self.size)
        box = square_box(*decoded.size, self.size, "center", (1.0, 1.0), 0, -1)
        return to_pixels(cut_square(decoded, box, self.size), self.channels)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        """The image, or the reason why there is none."""
        try:
            return index, self.pixels(index)
        except ValueError as error:
            return index, str(error).removeprefix(f"{self.path(index)}: ")

    def batches(self, size: int, workers: int | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """Of `size` files at a time: the places of those that can be read, and their pixels (B, C, H, W)."""
        if workers is None:
            workers = 0 if len(self) <= FEW else "auto"
        for batch in make_loader(self, SequentialBatches(len(self), size), workers, collate_fn=list):
            self.unreadable += [(self.paths[i], reason) for i, reason in batch if isinstance(reason, str)]
            read = [(i, pixels) for i, pixels in batch if not isinstance(pixels, str)]
            if read:
                places, pixels = zip(*read, strict=True)
                yield list(places), torch.stack(pixels)
