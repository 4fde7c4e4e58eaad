"""Many strings in two numpy arrays."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


class StringTable:
    """An immutable list of strings held as one byte buffer and one array of offsets.

    A Python list of a million paths is a million reference counts: a forked worker that only reads them still
    writes to their pages, and every worker ends with its own copy. Two flat buffers have none of that, take
    the bytes of the text plus 8 per string, and pickle as two memory copies. Text that is no valid UTF-8
    (file names can be such) survives through the file-system encoding.
    """

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray):
        self.buffer = buffer  # uint8 (bytes of all strings,)
        self.offsets = offsets  # int64 (len + 1,)

    @classmethod
    def from_bytes(cls, strings: Iterable[bytes]) -> "StringTable":
        strings = list(strings)
        offsets = np.zeros(len(strings) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in strings], out=offsets[1:])
        return cls(np.frombuffer(b"".join(strings), dtype=np.uint8), offsets)

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> "StringTable":
        return cls.from_bytes(os.fsencode(s) for s in strings)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def bytes_at(self, index: int) -> bytes:
        return self.buffer[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        return os.fsdecode(self.bytes_at(index))

    def select(self, rows: np.ndarray) -> "StringTable":
        """The strings at `rows`, as a new table."""
        return StringTable.from_bytes(self.bytes_at(int(row)) for row in rows)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes + self.offsets.nbytes

    def save(self, path: Path) -> None:
        """Write as one .npz file."""
        with open(path, "wb") as file:
            np.savez(file, buffer=self.buffer, offsets=self.offsets)

    @classmethod
    def load(cls, path: Path) -> "StringTable":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["buffer"], arrays["offsets"])
