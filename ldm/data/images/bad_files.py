"""Reading every file of a folder to find the bad ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch.utils.data import Dataset

from ldm.data.images.image_folder import ImageFolder
from ldm.data.images.pixels import read_image, to_rgb
from ldm.data.loading.loader import make_loader
from ldm.data.loading.order import SequentialBatches


class BadFile(NamedTuple):
    path: str
    reason: str


@dataclass
class _Check(Dataset):
    images: ImageFolder

    def __getitem__(self, index: int) -> BadFile | None:
        path = self.images.path(index)
        try:
            to_rgb(read_image(path, max_pixels=self.images.max_pixels).image, self.images.background)
        except ValueError as error:
            return BadFile(path, str(error).removeprefix(f"{path}: "))
        return None


def verify(
    images: ImageFolder, num_workers: int | str = "auto", progress: Callable[[int, int], None] | None = None
) -> list[BadFile]:
    """Decode every file at full size and list those that cannot become a sample, empty ones first.

    `images` is made with on_error="report" if it may hold empty files; `progress` is called with (files done,
    files in all).
    """
    bad, done = [BadFile(path, "empty file") for path in images.empty_files()], 0
    batches = SequentialBatches(len(images), batch_size=16)
    for found in make_loader(_Check(images), batches, num_workers, pin_memory=False, collate_fn=list):
        bad += filter(None, found)
        done += len(found)
        if progress:
            progress(done, len(images))
    return bad
