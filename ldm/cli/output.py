"""What commands write: whole files or none, and never over another without being told to."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
        raise FileExistsError(f"{folders[0]} is a folder, where a file would be written")
    if taken and not overwrite:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise FileExistsError(f"{taken[0]}{more} would be overwritten; choose another --out, or --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno)
        raise CannotWrite(f"cannot make the folder --out {out} ({reason}); choose another --out") from error


def refuse_inside(out: Path, images: Path) -> None:
    """ValueError where results would lie among the images that they are made of."""
    if images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"--out {out} lies inside {images}, whose images would then include the results")


def write_image(path: Path, image: Image.Image, **options) -> None:
    """A PNG, whole or not at all."""
    encoded = io.BytesIO()
    image.save(encoded, "png", **options)
    with whole_file(path) as file:
        file.write(encoded.getvalue())


def write_png(path: Path, pixels: np.ndarray, facts: dict | None = None) -> None:
    """uint8 (H, W) or (H, W, 3), with `facts` as JSON in the text chunk `ldm`."""
    info = PngImagePlugin.PngInfo()
    if facts is not None:
        info.add_text("ldm", json.dumps(facts, ensure_ascii=True))
    write_image(path, Image.fromarray(pixels), pnginfo=info)


@contextmanager
def npz_file(
    path: Path, count: int, labels: list[int] | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """`arr_0` uint8 (N, H, W, C) and `arr_1` int64 labels, as in guided-diffusion's files.

    The function given takes batches (B, H, W) or (B, H, W, C) until there are `count` images. They go to the
    disk as they come, so N costs no memory.
    """
    images, written = None, 0

    def add(pixels: np.ndarray) -> None:
        nonlocal images, written
        pixels = np.ascontiguousarray(pixels if pixels.ndim == 4 else pixels[..., None])
        if images is None:
            images = archive.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape[1:])}
            np.lib.format.write_array_header_1_0(images, header)
        images.write(pixels.data)
        written += len(pixels)

    with whole_file(path) as file:
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        try:
            yield add
            if written != count:
                raise RuntimeError(f"{written} of {count} images were written")
            images.close()
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy", _EPOCH), "w") as part:
                    np.lib.format.write_array(part, np.asarray(labels, dtype=np.int64))
            archive.close()
        except BaseException:
            for part in (images, archive):  # nothing tries to write the rest when the archive is forgotten
                with suppress(OSError, ValueError, AttributeError):
                    part.close()
            raise
