"""Rows on disk in files of bounded size."""

import os
from pathlib import Path

import numpy as np


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
