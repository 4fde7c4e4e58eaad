"""Latents encoded once, kept on disk, read as fast as memory."""

import json
import logging
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.images.dataset import AddressedDataset, Entry, StringTable, parse_entries
from ldm.data.latents.shards import MANIFEST, encode_into
from ldm.data.latents.statistics import MomentsFn, Progress
from ldm.data.loading.loader import make_loader
from ldm.data.loading.order import SequentialBatches, flip_mask
from ldm.files import locked, remove_leftovers, whole_folder
from ldm.wording import counted, some

logger = logging.getLogger(__name__)

VERSION = 1
_DTYPES = ("auto", "float32", "float16")


class LatentCache:
    """The latents of a dataset in memory-mapped shards, in a folder that is complete or not there.

    A row holds an image's posterior mean and standard deviation, for each orientation: (O, M, c, h, w) with O
    = 2 when the dataset mirrors, and M = 1 for a first stage without spread (std all zero). `manifest.json`
    says what the latents were made from.

    float16 rounds each value by at most 2^-11 (0.05 %) of itself, or 2^-25 where that is more; float32 makes
    cached training equal to encoding on the fly. "auto" is float32 up to 1 GiB, float16 beyond.

    Attributes:
        shape: (c, h, w) of a latent.
        dtype: "float32" or "float16".
        flips: whether both orientations are held.
        beside: what the samples have beside their latents, by key: labels, captions, what was asked for.
        classes: names of the labels, or None.
        latent_mean, latent_std: float32 (c,), see `ChannelStatistics`; before rounding, all orientations.
        fingerprint: 64 hex digits of what the latents were made from.
    """

    def __init__(self, directory: Path, manifest: dict):
        self.directory = directory
        self.manifest = manifest
        self.shape = tuple(manifest["shape"])
        self.dtype: str = manifest["dtype"]
        self.flips: bool = manifest["orientations"] == 2
        self.classes: list[str] | None = manifest["classes"]
        self.fingerprint: str = manifest["fingerprint"]
        self.latent_mean = torch.tensor(manifest["latent_mean"])
        self.latent_std = torch.tensor(manifest["latent_std"])
        self.beside = {key: _load_beside(directory / name) for key, name in _beside_of(manifest).items()}
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.manifest["count"]

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        moments_fn: MomentsFn,
        directory: str | Path,
        *,
        first_stage: str,
        flips: bool | None = None,
        beside: Collection[str] = (),
        dtype: str = "auto",
        batch_size: int = 32,
        shard_bytes: int = 256 << 20,
        num_workers: int | str = "auto",
        progress: Progress | None = None,
        reuse: bool = True,
    ) -> "LatentCache":
        """Open the cache at `directory` if it belongs to this data and first stage, else build it there.

        A stale, damaged or half-built cache is never used; the log says why it is made anew. Of several
        processes that ask at once, one builds and the others wait for it. An old cache stays in place until
        the new one is complete.

        Args:
            dataset: an `ImageDataset` with centre crops, whose plain view is encoded.
            moments_fn: gets images on the CPU.
            directory: becomes the cache; a lock file `.<name>.lock` stays beside it.
            first_stage: fingerprint of the encoder, its weights and precision.
            flips: hold both orientations; None asks `dataset.flip`.
            beside: keys of a sample to keep beside its latent; "label" and "caption" are kept anyway.
            dtype: "auto", "float32" or "float16".
            shard_bytes: largest size of a file.
            progress: called after every batch.
            reuse: false builds even if the cache at `directory` is good.

        Raises:
            ValueError: random crops, an empty dataset, no space on the disk, latents that are not finite, or
                a `directory` that holds something else.
        """
        directory = Path(directory)
        flips = getattr(dataset, "flip", False) if flips is None else flips
        _check_request(dataset, first_stage, dtype, shard_bytes)
        made_from = {"version": VERSION, "images": dataset.fingerprint(), "first_stage": first_stage}
        made_from |= {"flips": flips, "dtype": dtype}
        if more := sorted({*beside} - {"label", "caption"}):
            made_from["beside"] = more
        with locked(directory.with_name(f".{directory.name}.lock"), wait=True) as alone:
            if alone:
                remove_leftovers(directory)
            _refuse_foreign(directory)
            if reuse:
                manifest, problem = _read_manifest(directory)
                problem = problem or _differences(manifest["made_from"], made_from)
                if not problem:
                    return cls(directory, manifest)
                logger.info("encoding %s into %s: %s", counted(len(dataset), "image"), directory, problem)
                _tell_other_caches(directory, made_from["images"])
            batches = SequentialBatches(len(dataset), batch_size)
            loader = make_loader(dataset, batches, num_workers, pin_memory=False)
            with whole_folder(directory) as folder:
                encode_into(folder, dataset, loader, moments_fn, made_from, shard_bytes, progress)
            return cls.open(directory)

    @classmethod
    def open(cls, directory: str | Path) -> "LatentCache":
        """Open a cache, whatever it was made from; ValueError where there is none or a file is damaged."""
        directory = Path(directory)
        manifest, problem = _read_manifest(directory)
        if problem:
            raise ValueError(f"no usable latent cache at {directory}: {problem}")
        return cls(directory, manifest)

    def read(
        self, indices: np.ndarray, mirrored: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and std, float32 (B, c, h, w) each, of `indices` (B,), where `mirrored` (bool (B,))
        of the mirror image; ValueError where the cache has none."""
        indices = np.asarray(indices, dtype=np.int64)
        mirrored = np.zeros(len(indices), dtype=bool) if mirrored is None else mirrored
        if mirrored.any() and not self.flips:
            raise ValueError(f"the cache at {self.directory} holds no mirrored latents")
        shards, rows = np.divmod(indices, self.manifest["rows_per_shard"])
        moments = np.empty((self.manifest["moments"], len(indices), *self.shape), dtype=np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            found = self._map(int(shard))[rows[here], mirrored[here].astype(np.int64)]  # (B, M, c, h, w)
            moments[:, here] = found.swapaxes(0, 1)
        mean = torch.from_numpy(moments[0])
        std = torch.from_numpy(moments[1]) if len(moments) == 2 else torch.zeros_like(mean)
        return mean, std

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            path = self.directory / self.manifest["shards"][shard]
            self._maps[shard] = np.load(path, mmap_mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # a pickled map would carry the whole file

    def dataset(self) -> "LatentDataset":
        return LatentDataset(self)


class LatentDataset(AddressedDataset):
    """Samples of a cache: dict(mean, std, index, position), and what the cache has beside the latents.

    mean and std are float32 (c, h, w), mirrored where the images of the same seed and position would be.
    """

    in_memory = True  # as good as: the system keeps the mapped files in memory

    def __init__(self, cache: LatentCache):
        self.cache, self.classes, self.flip = cache, cache.classes, cache.flips
        self.labels = cache.beside.get("label")

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def sample_bytes(self) -> int:
        """What a sample takes on its way out of a worker process: mean and std."""
        return 2 * math.prod(self.cache.shape) * torch.float32.itemsize

    def fingerprint(self) -> str:
        return self.cache.fingerprint

    def __getitems__(self, entries: list[Entry]) -> dict:
        indices, positions = parse_entries(entries, len(self))
        mean, std = self.cache.read(indices, flip_mask(self.seed, positions) if self.flip else None)
        batch = {"mean": mean, "std": std}
        batch |= {"index": torch.from_numpy(indices), "position": torch.from_numpy(positions)}
        for key, values in self.cache.beside.items():
            texts = isinstance(values, StringTable)
            batch[key] = [values[i] for i in indices] if texts else torch.from_numpy(values[indices])
        return batch


def _beside_of(manifest: dict) -> dict[str, str]:
    """File names by key; caches of the first versions had two fixed ones."""
    if "beside" in manifest:
        return manifest["beside"]
    old = {"label": ("has_labels", "labels.npy"), "caption": ("has_captions", "captions.npz")}
    return {key: name for key, (flag, name) in old.items() if manifest[flag]}


def _load_beside(path: Path) -> np.ndarray | StringTable:
    return StringTable.load(path) if path.suffix == ".npz" else np.load(path)


def _check_request(dataset: Dataset, first_stage: str, dtype: str, shard_bytes: int) -> None:
    if getattr(dataset, "crop", "center") == "random":
        raise ValueError('random crops cannot be cached: set crop="center", or cache=false')
    if dtype not in _DTYPES:
        raise ValueError(f"dtype of a latent cache must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not isinstance(first_stage, str) or not first_stage:
        raise ValueError(f"first_stage must be the encoder's fingerprint, got {first_stage!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    if len(dataset) == 0:
        raise ValueError("a latent cache needs at least one image, the dataset is empty")


def _refuse_foreign(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: a latent cache is a folder")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} holds files but is no latent cache; it will not be replaced")


def _read_manifest(directory: Path) -> tuple[dict, str]:
    """The manifest and what is wrong with the cache ("" if nothing)."""
    path = directory / MANIFEST
    if not path.is_file():
        return {}, "there is none yet"
    try:
        manifest = json.loads(path.read_text())
        if manifest["made_from"]["version"] != VERSION:
            return {}, "it was made by another version"
        for name, size in manifest["files"].items():
            file = directory / name
            found = file.stat().st_size if file.is_file() else "missing"
            if found != size:
                return {}, f"{name} is damaged ({found} instead of {size} bytes)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    return manifest, ""


def _differences(old: dict, new: dict) -> str:
    words = {"images": "the images or how they are cropped", "first_stage": "the first stage"}
    changed = [
        words.get(key, f"{key} ({old.get(key)} -> {new[key]})") for key in new if old.get(key) != new[key]
    ]
    return f"changed since the last time: {', '.join(changed)}" if changed else ""


def other_caches(directory: Path, images: str) -> dict[Path, int]:
    """Folders beside `directory` with latents of the data set of this fingerprint, and their bytes."""
    found = {}
    for folder in sorted(file.parent for file in directory.parent.glob(f"*/{MANIFEST}")):
        manifest, problem = _read_manifest(folder)
        if not problem and folder != directory and manifest["made_from"]["images"] == images:
            found[folder] = sum(file.stat().st_size for file in folder.iterdir())
    return found


def _tell_other_caches(directory: Path, images: str) -> None:
    if found := other_caches(directory, images):
        taken = (
            f"{sum(found.values()) / 1e9:.2f} GB in {counted(len(found), 'folder')} under {directory.parent}"
        )
        names = some([path.name for path in found])
        logger.info("older latents of these images take %s (%s); delete what no run needs", taken, names)
