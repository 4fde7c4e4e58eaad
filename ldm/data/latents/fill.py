"""Running a first stage over a dataset and writing what it gives."""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.images.dataset import fingerprint_of
from ldm.data.latents.shards import ShardWriter
from ldm.data.latents.statistics import ChannelStatistics, MomentsFn, Progress
from ldm.data.latents.strings import StringTable
from ldm.files import check_space, whole_file

MANIFEST, LABELS, CAPTIONS = "manifest.json", "labels.npy", "captions.npz"
DTYPES = ("auto", "float32", "float16")
_EXACT_BELOW = 1 << 30  # "auto" keeps float32 up to this many bytes
_ADVICE = 'Ways out: dtype="float16", another folder, or cache=false to encode on the fly.'


def encode_into(
    folder: Path,
    dataset: Dataset,
    loader: DataLoader,
    moments_fn: MomentsFn,
    made_from: dict,
    shard_bytes: int,
    progress: Progress | None,
) -> None:
    """Fill `folder` with shards, labels and, last, the manifest.

    Args:
        loader: yields the plain view of `dataset`, in order.
        made_from: what makes the latents what they are; holds "flips" and "dtype".
    """
    count, flips = len(dataset), made_from["flips"]
    statistics, labels, captions = ChannelStatistics(), [], []
    writer, done = None, 0
    for batch in loader:
        images = batch["image"]
        views = [images, images.flip(-1)] if flips else [images]
        encoded = [_moments(moments_fn, view, batch["index"]) for view in views]
        for mean, std in encoded:
            statistics.update(mean, std)
        if writer is None:
            moments = 2 if any(std is not None and bool(std.any()) for _, std in encoded) else 1
            shape = tuple(encoded[0][0].shape[1:])
            writer = _start_writer(
                folder, count, (len(views), moments, *shape), made_from["dtype"], shard_bytes
            )
        rows = torch.stack([_row(mean, std, moments) for mean, std in encoded], dim=1)  # (B, O, M, c, h, w)
        writer.append(_cast(rows, writer.dtype))
        if "label" in batch:
            labels.append(batch["label"])
        captions += batch.get("caption", [])
        done += len(images)
        if progress is not None:
            progress(done, count)
    writer.close()
    if labels:
        np.save(folder / LABELS, torch.cat(labels).numpy())
    if captions:
        StringTable.from_strings(captions).save(folder / CAPTIONS)
    manifest = {
        "made_from": made_from,
        "fingerprint": fingerprint_of(made_from),
        "count": count,
        "shape": shape,
        "moments": moments,
        "orientations": len(views),
        "dtype": writer.dtype.name,
        "rows_per_shard": writer.rows_per_shard,
        "shards": writer.files,
        "has_labels": bool(labels),
        "has_captions": bool(captions),
        "classes": getattr(dataset, "classes", None),
        "latent_mean": statistics.mean.tolist(),
        "latent_std": statistics.std.tolist(),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    with whole_file(folder / MANIFEST, durable=True) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _moments(moments_fn: MomentsFn, images: torch.Tensor, indices: torch.Tensor):
    mean, std = moments_fn(images)
    mean = mean.detach().float().cpu()
    std = None if std is None else std.detach().float().cpu()
    if len(mean) != len(images) or (std is not None and std.shape != mean.shape):
        raise ValueError(
            f"moments_fn gave mean {tuple(mean.shape)} and std {None if std is None else tuple(std.shape)} "
            f"for {len(images)} images: both must be (B, c, h, w)"
        )
    bad = ~mean.flatten(1).isfinite().all(1)
    if std is not None:
        bad |= ~std.flatten(1).isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"the first stage gave latents that are not finite for images {indices[bad].tolist()}"
        )
    return mean, std


def _start_writer(
    folder: Path, count: int, row: tuple[int, ...], dtype: str, shard_bytes: int
) -> ShardWriter:
    values = count * int(np.prod(row))
    if dtype == "auto":
        dtype = "float32" if 4 * values <= _EXACT_BELOW else "float16"
    check_space(folder, values * np.dtype(dtype).itemsize, _ADVICE)
    return ShardWriter(folder, count, row, np.dtype(dtype), shard_bytes)


def _row(mean: torch.Tensor, std: torch.Tensor | None, moments: int) -> torch.Tensor:
    """(B, M, c, h, w)"""
    if moments == 1:
        if std is not None and std.any():
            raise ValueError("moments_fn gave std = 0 for the first images and not for later ones")
        return mean[:, None]
    return torch.stack([mean, torch.zeros_like(mean) if std is None else std], dim=1)


def _cast(rows: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float16 and rows.abs().max() > np.finfo(np.float16).max:
        raise ValueError(f'latents reach {rows.abs().max():g}, more than float16 holds: set dtype="float32"')
    return rows.numpy().astype(dtype)
