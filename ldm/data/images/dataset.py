"""What every image dataset shares: how it is asked for samples, its names, its split, its fingerprint."""

import copy
import hashlib
import json
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.loading.order import check_seed

# A sample is asked for by index alone (the plain view) or by (index, position in the run).
Entry = int | tuple[int, int]


def parse_entries(entries: Sequence[Entry], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and positions, int64 (B,) each; an entry without a position gets -1.

    IndexError for an index outside [0, length), ValueError for a negative position.
    """
    pairs = [entry if isinstance(entry, tuple | list) else (operator.index(entry), -1) for entry in entries]
    indices = np.array([index for index, _ in pairs], dtype=np.int64)
    positions = np.array([position for _, position in pairs], dtype=np.int64)
    outside = (indices < 0) | (indices >= length)
    if outside.any():
        raise IndexError(f"index {indices[outside][0]} of a dataset of {length} samples")
    if (positions < -1).any():
        raise ValueError(f"position must not be negative, got {positions.min()}")
    return indices, positions


def check_shape(size: int, channels: int, least: int = 1) -> None:
    """ValueError unless images (channels, size, size) can be made, `least` being the smallest size."""
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ValueError(f"size must be an integer of at least {least} (pixels of a side), got {size!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")


def validation_mask(hashes: np.ndarray, validation: float | int) -> np.ndarray:
    """Which samples belong to validation, bool (N,), by their names' hashes uint64 (N,).

    A share takes every sample whose hash falls under it: files that are added later move nobody else. A count
    takes the smallest hashes, or raises ValueError where that leaves nothing to train on. Equal hashes stay
    together. Training always keeps a sample; validation gets one of two or more if `validation` is above 0.
    """
    if validation == 0:
        return np.zeros(len(hashes), dtype=bool)
    if isinstance(validation, int):
        if validation >= len(hashes):
            raise ValueError(f"validation={validation} leaves nothing to train on, of {len(hashes)} images")
        chosen = hashes <= np.partition(hashes, validation - 1)[validation - 1]
    else:
        chosen = hashes.astype(np.float64) * 2.0**-64 < validation
        if not chosen.any() and len(hashes) >= 2:
            chosen[hashes.argmin()] = True
    if chosen.all():
        chosen[hashes.argmax()] = False
    return chosen


def fingerprint_of(*parts: np.ndarray | dict) -> str:
    """sha256 of arrays (by their bytes) and of JSON-like options, as 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


class StringTable:
    """An immutable list of strings held as one byte buffer and one array of offsets.

    A forked worker that only reads a Python list of a million paths still writes to their reference counts,
    and ends with its own copy. File names that are no valid UTF-8 survive by the file-system encoding.
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
        return StringTable.from_bytes(self.bytes_at(int(row)) for row in rows)

    def hashes(self) -> np.ndarray:
        """uint64 (len,): a stable hash of each string, the same on every machine and in every version."""
        return np.array([name_hash(self.bytes_at(i)) for i in range(len(self))], dtype=np.uint64)

    def save(self, path: Path) -> None:
        np.savez(path, buffer=self.buffer, offsets=self.offsets)

    @classmethod
    def load(cls, path: Path) -> "StringTable":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["buffer"], arrays["offsets"])


def name_hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


class AddressedDataset(Dataset):
    """A map-style dataset whose samples are asked for by (index, position) or, for the plain view, by index.

    `position` counts samples since the start of the run; what is random in a sample is a pure function of
    (seed, position), and the plain view, at position -1, has nothing random.
    """

    in_memory = False  # whether samples cost no reading, so that worker processes would only slow them down
    classes: list[str] | None = None  # names in the order of their labels
    seed = 0

    def __getitem__(self, entry: Entry) -> dict:
        return {key: value[0] for key, value in self.__getitems__([entry]).items()}

    @property
    def num_classes(self) -> int:
        return len(self.classes) if self.classes else 0

    def set_seed(self, seed: int) -> None:
        """Choose the randomness of a run. Call it before a loader starts: workers hold a copy."""
        self.seed = check_seed(seed)


class ImageDataset(AddressedDataset):
    """Base of the image datasets. A sample is a dict of

        image     float32 (channels, size, size) in [-1, 1]
        label     int64, when the set has classes
        index     int64, within this dataset
        position  int64

    `ds[(index, position)]` is cropped and flipped by (seed, position); `ds[index]` is the centre crop.

    Attributes:
        size, channels, crop, flip: how samples are made.
        part: "all", "train" or "validation".
        rows: int64 (len,), which samples of the whole set this part has.
    """

    crop = "center"

    def __init__(self, count: int, size: int, channels: int, flip: bool, validation: float | int):
        check_shape(size, channels)
        if not isinstance(flip, bool):
            raise ValueError(f"flip must be true or false, got {flip!r}")
        share = isinstance(validation, float) and 0 <= validation < 1
        if not share and (isinstance(validation, bool) or not isinstance(validation, int) or validation < 0):
            raise ValueError(
                f"validation must be a share in [0, 1) or a number of images, got {validation!r}"
            )
        self.size, self.channels, self.flip, self.validation = size, channels, flip, validation
        self.part = "all"
        self.rows = np.arange(count)
        self._names: StringTable  # what each sample of the whole set is called
        self._labels: np.ndarray | None = None  # int64, of the whole set

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (len,) in [0, num_classes), or None without classes."""
        return None if self._labels is None else self._labels[self.rows]

    @property
    def sample_bytes(self) -> int:
        """What the image of a sample takes on its way out of a worker process."""
        return self.channels * self.size**2 * torch.float32.itemsize

    def split(self, part: str) -> "ImageDataset":
        """The training or the validation part; they share what the whole holds in memory.

        With `validation` 0, or with a single image, the validation part has length 0.
        """
        if part not in ("train", "validation"):
            raise ValueError(f'split must be "train" or "validation", got {part!r}')
        if self.part != "all":
            raise ValueError(f"this dataset is already the {self.part} part")
        view = copy.copy(self)
        view.part, view.rows = part, np.flatnonzero(self._part_mask(part))
        return view

    def _part_mask(self, part: str) -> np.ndarray:
        chosen = validation_mask(self._names.hashes(), self.validation)
        return chosen if part == "validation" else ~chosen

    def fingerprint(self) -> str:
        """64 hex digits that change with the images, the labels, or how the plain view is made."""
        raise NotImplementedError
