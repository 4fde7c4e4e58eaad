"""Any Python data set of images, as training wants it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.images.dataset import Entry, ImageDataset, StringTable, fingerprint_of, parse_entries
from ldm.data.images.pixels import (
    Decoded,
    cut_square,
    normalize_pixels,
    parse_background,
    square_box,
    to_pixels,
)
from ldm.data.loading.order import flip_mask

_LOOKED_AT = 64  # samples in a fingerprint


class Wrapped(ImageDataset):
    """A data set of one's own. See `ImageDataset` for samples; conditions stand beside the image by name.

    Args:
        source: has `__len__`, and `source[i]` is an image, or (image, conditions), or a mapping with an
            "image" among its conditions. An image is a PIL image or a uint8 array (H, W) or (H, W, C);
            conditions are numbers, texts or tensors, `label` among them where there are classes. It may have
            `classes` (names) and `fingerprint()` of its own.
        size: pixels of a side; images are resized and cut at their centre.
        channels: 1 or 3. background: what shows through transparent parts.
        flip, validation: as in `ImageDataset`; a sample's part follows from its number.

    Raises:
        ValueError: a source of another kind, or an empty one.
    """

    def __init__(
        self,
        source: Any,
        size: int,
        channels: int = 3,
        flip: bool = False,
        background: str | tuple[int, int, int] = "white",
        validation: float | int = 0.02,
    ):
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or len(source) == 0:
            raise ValueError(f"source must have a length above 0 and items, got a {type(source).__name__}")
        super().__init__(len(source), size, channels, flip, validation)
        self.source, self.background = source, parse_background(background)
        self.classes = getattr(source, "classes", None)
        self._names = StringTable.from_strings([str(i) for i in range(len(source))])

    def fingerprint(self) -> str:
        """The source's own, else of its length and of up to 64 samples spread over it."""
        options = {"kind": "Wrapped", "size": self.size, "channels": self.channels, "classes": self.classes}
        if hasattr(self.source, "fingerprint"):
            return fingerprint_of({**options, "source": str(self.source.fingerprint())}, self.rows)
        spread = np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).astype(int)
        looked_at = [self.compact(int(i))["image"].numpy() for i in spread]
        return fingerprint_of(options, self.rows, *looked_at)

    def __getitem__(self, entry: Entry) -> dict[str, Any]:
        sample = self.compact(entry)
        return {**sample, "image": normalize_pixels(sample["image"])}

    def compact(self, entry: Entry) -> dict[str, Any]:
        """A sample whose image is uint8 (C, H, W)."""
        indices, positions = parse_entries([entry], len(self))
        index, position = int(indices[0]), int(positions[0])
        image, conditions = self._parts(self.source[int(self.rows[index])], index)
        box = square_box(*image.size, self.size, "center", (1.0, 1.0), self.seed, position)
        cut = cut_square(Decoded(image, 1.0, image.size, 1), box, self.size, self.background)
        pixels = to_pixels(cut, self.channels)
        if self.flip and flip_mask(self.seed, positions)[0]:
            pixels = pixels.flip(-1)
        beside = {
            name: value if isinstance(value, str) else torch.as_tensor(value) for name, value in conditions
        }
        return {"image": pixels, **beside, "index": torch.tensor(index), "position": torch.tensor(position)}

    def _parts(self, sample: Any, index: int) -> tuple[Image.Image, list[tuple[str, Any]]]:
        if isinstance(sample, Mapping):
            image, conditions = sample.get("image"), {k: v for k, v in sample.items() if k != "image"}
        else:
            image, conditions = sample if isinstance(sample, tuple) else (sample, {})
        if isinstance(image, np.ndarray | torch.Tensor):
            array = np.asarray(image)
            image = Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)
        if not isinstance(image, Image.Image):
            raise ValueError(f"source[{index}] holds no PIL image or array, but a {type(image).__name__}")
        return image, list(conditions.items())
