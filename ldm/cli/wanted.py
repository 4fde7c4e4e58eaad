"""What each image that is asked for is conditioned on, from the words of the command line: its class, and the
image that it is a variation of."""

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ldm.cli.machine import progress_bar
from ldm.data.images.given import FEW, Pictures, find_images
from ldm.data.images.pixels import normalize_pixels
from ldm.latent_diffusion import LatentDiffusion
from ldm.wording import nearest, some

log = logging.getLogger(__name__)

_RANGE = re.compile(r"([0-9]+)\s*-\s*([0-9]+)")
_NUMBER = re.compile(r"[0-9]+")
_SHOWN = 30  # classes in a message
_NAME = 48  # letters in a file's name for what an image is conditioned on
_AT_ONCE = 16


# Classes


def class_names(model: LatentDiffusion) -> list[str]:
    """Names of the model's classes; numbers where it does not know their names."""
    embedder = next(e for e in model.conditioner.embedders if e.key == "label")
    names = list(getattr(model, "description", {}).get("classes") or [])
    if len(names) > embedder.num_classes:
        raise ValueError(f"the model names {len(names)} classes, but was built for {embedder.num_classes}")
    return names + [str(i) for i in range(len(names), embedder.num_classes)]


def parse_classes(text: str, names: list[str]) -> list[int]:
    """ "cat,dog", "0-4,7" or both -> labels, in the order asked for and as often as asked for.

    A number is a label, counted from 0; but where classes are named by numbers (folders "1", "2", "5"), a
    number is a name, and a range is a range of names. A name may hold commas.

    Raises:
        ValueError: what is no class, with the nearest name and what exists.
    """
    numeric = {int(name): i for i, name in reversed(list(enumerate(names))) if _NUMBER.fullmatch(name)}
    by_number = numeric or dict(enumerate(range(len(names))))
    labels: list[int] = []
    for token in _tokens(text, names):
        span = _RANGE.fullmatch(token)
        if token in names:
            labels.append(names.index(token))
        elif span or _NUMBER.fullmatch(token):
            first, last = (int(number) for number in (span.groups() if span else (token, token)))
            if first > last:
                raise ValueError(f"--classes {token}: a range goes upwards, {last}-{first}")
            # The ends first: between them there may be very many numbers.
            for number in (first, last, *(range(first, last) if {first, last} <= by_number.keys() else ())):
                if number not in by_number:
                    raise ValueError(_unknown(str(number), names))
            labels += [by_number[number] for number in range(first, last + 1)]
        else:
            raise ValueError(_unknown(token, names))
    if not labels:
        raise ValueError(f"--classes {text!r} names no class")
    return labels


def _tokens(text: str, names: list[str]) -> list[str]:
    """The parts between commas, except that the longest run of parts that is a name stays together."""
    parts, tokens = text.split(","), []
    commas = max((name.count(",") for name in names), default=0)
    while parts:
        lengths = range(min(commas + 1, len(parts)), 1, -1)
        length = next((n for n in lengths if ",".join(parts[:n]).strip() in names), 1)
        token = ",".join(parts[:length]).strip()
        tokens += [token] if token else []
        parts = parts[length:]
    return tokens


def _unknown(token: str, names: list[str]) -> str:
    found = nearest(token, names)
    hint = f" Did you mean {found!r}?" if found else ""
    shown = ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
    numbers = "" if any(_NUMBER.fullmatch(name) for name in names) else f"; or by number, 0-{len(names) - 1}"
    return f"there is no class {token!r}.{hint} Classes: {shown}{numbers}"


def choose_labels(model: LatentDiffusion, classes: str | None, n: int) -> list[int] | None:
    """The label of every image, or None for a model without classes.

    With `classes`, `n` images of each; without, `n` images of all classes in turn.
    """
    if "label" not in model.conditioner.keys:
        if classes is not None:
            raise ValueError("--classes was given, but this model is not conditioned on classes")
        return None
    names = class_names(model)
    if classes is None:
        return [i % len(names) for i in range(n)]
    return [label for label in parse_classes(classes, names) for _ in range(n)]


def safe_name(name: str, longest: int = _NAME) -> str:
    """A name as a part of a file's name on any system."""
    return re.sub(r"[^\w-]+", "_", name)[:longest] or "_"


# Classes and images


@dataclass(frozen=True)
class Wanted:
    """All images to draw, in order.

    count: how many. labels: the class of each, of which `classes` are the names; None without classes.
    pictures, shown: images that are varied, and which of them each is a variation of; None without.
    """

    count: int
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    pictures: Pictures | None = None
    shown: list[int] = field(default_factory=list)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the model's conditioner reads for these images."""
        found = {}
        if self.labels is not None:
            found["label"] = torch.tensor([self.labels[i] for i in indices])
        if self.pictures is not None:
            found["image"] = self.images(indices)
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
    embedders = model.conditioner.embedders
    # An image that lies beside the latent is one to complete or to enlarge, not one to vary.
    known = [e for e in embedders if e.key == "label" or (e.key == "image" and e.kind != "concat")]
    if len(known) < len(embedders):
        raise ValueError(
            f"this model is conditioned on {', '.join(sorted(set(model.conditioner.keys)))}; this command "
            "knows classes and images only"
        )
    labels = choose_labels(model, classes, n)
    names = class_names(model) if labels is not None else []
    row = n if labels is None else len(labels)
    if "image" not in model.conditioner.keys:
        if image is not None:
            has = "classes: see --classes" if labels is not None else "nothing"
            raise ValueError(f"--image was given, but this model is conditioned on {has}, not on images")
        return Wanted(row, labels, names)
    pictures, readable = _find(model, image)
    labels = None if labels is None else labels * len(readable)
    return Wanted(
        row * len(readable), labels, names, pictures, [place for place in readable for _ in range(row)]
    )


def _find(model: LatentDiffusion, image: Path | None) -> tuple[Pictures, list[int]]:
    """The images, and the places of those that can be read; the others are named."""
    if image is None:
        raise ValueError(
            "this model draws variations of images: give --image PATH, an image or a folder of images"
        )
    height, width = model.image_size
    if height != width:
        raise ValueError(f"--image: images are cut to squares, but this model is of {width}x{height} pixels")
    pictures = Pictures(*find_images(image), height, model.first_stage_model.image_channels)
    readable: list[int] = []
    many = len(pictures) > FEW
    with progress_bar(len(pictures), "reading") if many else contextlib.nullcontext() as bar:
        for places, _ in pictures.batches(_AT_ONCE):
            readable += places
            if bar is not None:
                bar.update(len(places))
    bad = [": ".join(pair) for pair in pictures.unreadable]
    if not readable:
        raise ValueError(f"no image of --image {image} can be read: {some(bad)}")
    for line in bad:
        log.warning("%s", line)
    return pictures, readable
