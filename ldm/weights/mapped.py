"""A file's bytes as memory that the operating system pages in on demand."""

import mmap
import sys
from pathlib import Path

import torch

from ldm.weights.errors import UnsupportedCheckpoint, require

_ALIGNMENT = 8


class MappedFile:
    """A file mapped privately: tensors made from it cost no memory until written to, and never change it.

    The mapping lives as long as any tensor made from it. Replacing the file by renaming another over it (as
    `ldm.files.whole_file` does) leaves such tensors as they are; truncating it in place does not.

    Attributes:
        where: the path, for messages.
        size: bytes.
        map, view: the bytes, as a file to read and as a memoryview.
    """

    def __init__(self, path: str | Path):
        self.where = str(path)
        little = sys.byteorder == "little"
        require(little, self.where, "weights are read on little-endian machines only", UnsupportedCheckpoint)
        with open(path, "rb") as file:
            self.size = file.seek(0, 2)
            require(self.size, self.where, "the file is empty (0 bytes)")
            # A private copy-on-write map, so that torch may hold it as writable memory.
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.view = memoryview(self.map)

    def storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """The bytes [offset, offset + nbytes) as a storage: a view of the mapping if they are aligned."""
        end = offset + nbytes
        inside = 0 <= offset <= end <= self.size
        require(inside, self.where, f"is truncated or damaged: no bytes {offset} to {end} in {self.size}")
        if nbytes == 0:
            return torch.UntypedStorage(0)
        piece = torch.frombuffer(self.map, dtype=torch.uint8, count=nbytes, offset=offset)
        if offset % _ALIGNMENT:
            piece = piece.clone()  # misaligned elements are slow at best
        return piece.untyped_storage()
