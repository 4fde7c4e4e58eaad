"""What commands write: whole files or none, and never over another without being told to."""

import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from ldm.files import CannotWrite, whole_file

_EPOCH = (1980, 1, 1, 0, 0, 0)  # no dates inside: the same content is the same bytes


def prepare_folder(out: Path, names: Iterable[str], overwrite: bool) -> None:
    """Make `out`, where files of these relative `names` are about to be written.

    Raises:
        ValueError: `out` is no folder.
        FileExistsError: some are there already; nothing was made or written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    taken = [str(out / name) for name in names if os.path.lexists(out / name)] if out.exists() else []
    folders = [path for path in taken if os.path.isdir(path)]
    if folders:
        raise FileExistsError(
            f"{folders[0]} is a folder, where a file would be written; choose another --out"
        )
    if taken and not overwrite:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise FileExistsError(
            f"{taken[0]}{more} would be overwritten; choose another --out, or say --overwrite"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(
            f"cannot make the folder --out {out} ({os.strerror(error.errno)}); choose another --out"
        ) from error


def write_png(path: Path, pixels: np.ndarray, facts: dict | None = None) -> None:
    """uint8 (H, W) or (H, W, 3), with `facts` as JSON in the text chunk `ldm`."""
    info = PngImagePlugin.PngInfo()
    if facts is not None:
        info.add_text("ldm", json.dumps(facts, ensure_ascii=True))
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "png", pnginfo=info)
    with whole_file(path) as file:
        file.write(encoded.getvalue())


class NpzWriter:
    """`arr_0` uint8 (N, H, W, C) batch by batch, then `arr_1` int64 labels, as in guided-diffusion's files.

    The images go to the disk as they come, so N costs no memory. Use `NpzWriter.at(path, N)`.
    """

    def __init__(self, file: BinaryIO, count: int):
        self.count, self._written = count, 0
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._images = None

    @classmethod
    @contextmanager
    def at(cls, path: Path, count: int) -> Iterator["NpzWriter"]:
        with whole_file(path) as file:
            writer = cls(file, count)
            try:
                yield writer
                writer.close()
            except BaseException:
                writer.abandon()
                raise

    def add(self, pixels: np.ndarray) -> None:
        """A batch (B, H, W) or (B, H, W, C)."""
        pixels = np.ascontiguousarray(pixels if pixels.ndim == 4 else pixels[..., None])
        if self._images is None:
            self._images = self._archive.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *pixels.shape[1:])}
            np.lib.format.write_array_header_1_0(self._images, header)
        self._images.write(pixels.data)
        self._written += len(pixels)

    def finish(self, labels: list[int] | None) -> None:
        """After the last batch."""
        if self._written != self.count:
            raise RuntimeError(f"{self._written} of {self.count} images were written")
        self._images.close()
        if labels is not None:
            with self._archive.open(zipfile.ZipInfo("arr_1.npy", _EPOCH), "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))

    def close(self) -> None:
        if self._images is not None:
            self._images.close()
        self._archive.close()

    def abandon(self) -> None:
        """After an error: nothing tries to write the rest when the archive is forgotten."""
        for part in (self._images, self._archive):
            with suppress(OSError, ValueError):
                if part is not None:
                    part.close()
