"""What each image that is asked for is conditioned on: its class, and the image that it is a variation of."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ldm.cli.classes import choose_labels, class_names, safe_name
from ldm.cli.images import FEW, Pictures, find_images
from ldm.cli.progress import progress_bar
from ldm.data.images.pixels import normalize_pixels
from ldm.data.images.scan import some
from ldm.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)

_NAME = 48  # letters in a file's name for what an image is conditioned on
_AT_ONCE = 16


@dataclass(frozen=True)
class Wanted:
    """All images to draw, in order.

    count: how many. labels: the class of each, of which `classes` are the names; None without classes.
    pictures, shown: images that are varied, and which of them each is a variation of; None without.
    unreadable: path and reason of images that nothing is drawn of.
    """

    count: int
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    pictures: Pictures | None = None
    shown: list[int] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """What the model's conditioner reads for these images; empty for an unconditional model."""
        found = {}
        if self.labels is not None:
            found["label"] = torch.tensor([self.labels[i] for i in indices], device=device)
        if self.pictures is not None:
            found["image"] = self.images(indices).to(device)
        return found

    def images(self, indices: Sequence[int]) -> Tensor:
        """The images (B, C, H, W) in [-1, 1] that these are variations of."""
        places = [self.shown[i] for i in indices]
        read = {place: self.pictures.pixels(place) for place in dict.fromkeys(places)}
        return normalize_pixels(torch.stack([read[place] for place in places]))

    def file_names(self) -> list[str]:
        """00000-<image>-<class>.png, with the parts that there are."""
        digits = max(5, len(str(self.count - 1)))
        parts = [[f"{i:0{digits}d}" for i in range(self.count)]]
        longest = _NAME // 2 if self.pictures is not None and self.labels is not None else _NAME
        if self.pictures is not None:
            stems = [safe_name(PurePosixPath(path).stem, longest) for path in self.pictures.paths]
            parts.append([stems[place] for place in self.shown])
        if self.labels is not None:
            names = [safe_name(name, longest) for name in self.classes]
            parts.append([names[label] for label in self.labels])
        return ["-".join(name) + ".png" for name in zip(*parts, strict=True)]

    def facts(self, index: int) -> dict[str, str]:
        """The conditions of one image, in words."""
        found = {}
        if self.pictures is not None:
            found["image"] = self.pictures.path(self.shown[index])
        if self.labels is not None:
            found["class"] = self.classes[self.labels[index]]
        return found


def choose(model: LatentDiffusion, n: int, classes: str | None = None, image: Path | None = None) -> Wanted:
    """What to draw: `n` images, or `n` of each class, or of each image, or of each image with each class.

    Raises:
        ValueError, FileNotFoundError: the model has no such condition, or another one; no such class; no such
            image, or none that can be read. In terms of what exists.
    """
    other = {e.key for e in model.conditioner.embedders if e.key not in ("label", "image") or _is_map(e)}
    if other:
        raise ValueError(
            f"this model is conditioned on {', '.join(sorted(set(model.conditioner.keys)))}; this command "
            "knows classes and images only"
        )
    labels = choose_labels(model, classes, n)
    names = class_names(model) if labels is not None else []
    row = n if labels is None else len(labels)
    found = _find(model, image)
    if found is None:
        return Wanted(row, labels, names)
    pictures, readable, unreadable = found
    return Wanted(
        count=row * len(readable),
        labels=None if labels is None else labels * len(readable),
        classes=names,
        pictures=pictures,
        shown=[place for place in readable for _ in range(row)],
        unreadable=unreadable,
    )


def _is_map(embedder) -> bool:
    """Whether it lies beside the latent: an image to complete or to enlarge, not one to vary."""
    return embedder.key == "image" and embedder.kind == "concat"


def _find(
    model: LatentDiffusion, image: Path | None
) -> tuple[Pictures, list[int], list[tuple[str, str]]] | None:
    """The images, the places of those that can be read, and path and reason of the others."""
    keys = model.conditioner.keys
    if "image" not in keys:
        if image is not None:
            has = "on classes: see --classes" if "label" in keys else "on nothing"
            raise ValueError(
                f"--image was given, but this model is not conditioned on images; it is conditioned {has}"
            )
        return None
    if image is None:
        raise ValueError(
            "this model draws variations of images: give --image PATH, an image or a folder of images"
        )
    height, width = model.image_size
    if height != width:
        raise ValueError(f"--image: images are cut to squares, but this model is of {width}x{height} pixels")
    folder, paths, unreadable = find_images(image)
    pictures = Pictures(folder, paths, height, model.first_stage_model.image_channels)
    readable: list[int] = []
    many = len(paths) > FEW
    with progress_bar(len(paths), "reading") if many else contextlib.nullcontext() as bar:
        for places, _, bad in pictures.batches(_AT_ONCE):
            readable += places
            unreadable += bad
            if bar is not None:
                bar.update(len(places) + len(bad))
    if not readable:
        raise ValueError(
            f"no image of --image {image} can be read: {some([': '.join(bad) for bad in unreadable])}"
        )
    for path, reason in unreadable:
        log.warning("%s: %s", path, reason)
    return pictures, readable, unreadable
