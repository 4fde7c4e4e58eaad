"""Writing latents: rows in shards of bounded size, and the manifest that describes them."""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.images.dataset import StringTable, fingerprint_of
from ldm.data.latents.statistics import ChannelStatistics, MomentsFn, Progress, encoded
from ldm.files import check_space, whole_file

MANIFEST = "manifest.json"
_EXACT_BELOW = 1 << 30  # "auto" keeps float32 up to this many bytes
_ADVICE = 'Ways out: dtype="float16", another folder, or cache=false.'


def encode_into(
    folder: Path,
    dataset: Dataset,
    loader: DataLoader,
    moments_fn: MomentsFn,
    made_from: dict,
    shard_bytes: int,
    progress: Progress | None,
) -> None:
    """Fill `folder` with shards, what stands beside the latents and, last, the manifest.

    `loader` yields the plain view of `dataset`, in order; `made_from` is what makes the latents what they
    are, with "flips", "dtype" and perhaps "beside".
    """
    count, flips = len(dataset), made_from["flips"]
    statistics, writer = ChannelStatistics(), None
    beside = {key: [] for key in ("label", "caption", *made_from.get("beside", ()))}
    for batch, views in encoded(loader, moments_fn, count, flips, progress):
        for mean, std in views:
            statistics.update(mean, std)
        spread = any(bool(std.any()) for _, std in views)
        if writer is None:  # the first batch says whether there is a spread, and how large a latent is
            moments, shape = 2 if spread else 1, tuple(views[0][0].shape[1:])
            row_shape = (len(views), moments, *shape)
            writer = ShardWriter(folder, count, row_shape, made_from["dtype"], shard_bytes)
        if moments == 1 and spread:
            raise ValueError("moments_fn gave std = 0 for the first images and not for later ones")
        rows = torch.stack([torch.stack(both[:moments], dim=1) for both in views], dim=1)
        writer.append(rows)  # (B, O, M, c, h, w)
        for key in beside.keys() & batch.keys():
            beside[key].extend(batch[key])
    writer.close()
    if lacks := [key for key in made_from.get("beside", ()) if not beside[key]]:
        raise ValueError(f"the samples have no {', '.join(lacks)}, only {', '.join(sorted(batch))}")
    files = {key: _save_beside(folder, key, values) for key, values in beside.items() if values}
    manifest = {
        "made_from": made_from,
        "fingerprint": fingerprint_of(made_from),
        "count": count,
        "shape": shape,
        "moments": moments,
        "orientations": 2 if flips else 1,
        "dtype": writer.dtype.name,
        "rows_per_shard": writer.rows_per_shard,
        "shards": writer.files,
        "beside": files,
        "classes": getattr(dataset, "classes", None),
        "latent_mean": statistics.mean.tolist(),
        "latent_std": statistics.std.tolist(),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    with whole_file(folder / MANIFEST, durable=True) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _save_beside(folder: Path, key: str, values: list) -> str:
    """Write what all samples have under a key, texts or tensors of one shape; returns the file's name."""
    if isinstance(values[0], str):
        StringTable.from_strings(values).save(folder / f"{key}.npz")
        return f"{key}.npz"
    np.save(folder / f"{key}.npy", torch.stack(values).numpy())
    return f"{key}.npy"


class ShardWriter:
    """`count` rows of one shape, appended to shard-00000.npy and so on in `folder`.

    A shard has as many whole rows as fit into `shard_bytes`, at least one. The files are written as streams:
    on a full disk a write fails with a message, a store into a memory map kills the process.

    Raises:
        ValueError: the disk has no room for all rows, or a value does not fit into the type.
    """

    def __init__(self, folder: Path, count: int, row_shape: tuple[int, ...], dtype: str, shard_bytes: int):
        values = math.prod(row_shape)
        if dtype == "auto":
            dtype = "float32" if 4 * count * values <= _EXACT_BELOW else "float16"
        self.folder, self.count, self.row_shape, self.dtype = folder, count, row_shape, np.dtype(dtype)
        row_bytes = values * self.dtype.itemsize
        check_space(folder, count * row_bytes, _ADVICE)
        self.rows_per_shard = max(1, shard_bytes // row_bytes)
        self.written = 0
        self.files: list[str] = []
        self._file = None

    def append(self, rows: torch.Tensor) -> None:
        """Add rows, float32 (n, *row_shape)."""
        most = rows.abs().max()
        if self.dtype == np.float16 and most > np.finfo(np.float16).max:
            raise ValueError(f'latents reach {most:g}, more than float16 holds: set dtype="float32"')
        rows = rows.numpy().astype(self.dtype)
        while len(rows):
            room = self.rows_per_shard - self.written % self.rows_per_shard
            if self._file is None:
                self._open()
            part, rows = rows[:room], rows[room:]
            self._file.write(part.tobytes())
            self.written += len(part)
            if len(part) == room:
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
