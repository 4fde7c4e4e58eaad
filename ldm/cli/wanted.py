"""What each image that is asked for is conditioned on, from the words of the command line: its class, the
image that it is a variation of, and whatever else the model's embedders read."""

import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ldm.cli.machine import progress_bar
from ldm.conditioning import Embedder
from ldm.data.images.given import FEW, Pictures, find_images
from ldm.data.images.pixels import normalize_pixels
from ldm.latent_diffusion import LatentDiffusion
from ldm.wording import did_you_mean, nearest, some

log = logging.getLogger(__name__)

_RANGE = re.compile(r"([0-9]+)\s*-\s*([0-9]+)")
_NUMBER = re.compile(r"[0-9]+")
_SHOWN = 30  # classes in a message
_NAME = 48  # letters in a file's name for what an image is conditioned on
_AT_ONCE = 16


@dataclass(frozen=True)
class Condition:
    """What one key of the batch holds.

    words: every value in words. names: for file names. which: the place among them of each image's value.
    read: some places -> what the embedder reads.
    """

    key: str
    words: Sequence[str]
    names: Sequence[str]
    which: list[int]
    read: Callable[[list[int]], Any]


@dataclass(frozen=True)
class Wanted:
    """All images to draw, in order.

    count: how many. each: of one class and image. by_class: whether classes were asked for by name.
    pictures: images that are varied, None without.
    """

    count: int
    each: int
    by_class: bool
    conditions: list[Condition]
    pictures: Pictures | None = None

    @property
    def labels(self) -> list[int] | None:
        """The class of each image, None without classes."""
        return next((c.which for c in self.conditions if c.key == "label"), None)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """What the model's conditioner reads for these images."""
        return {c.key: c.read([c.which[i] for i in indices]) for c in self.conditions}

    def file_names(self) -> list[str]:
        """00000-<image>-<class>-<others>.png, with the parts that there are."""
        digits = max(5, len(str(self.count - 1)))
        parts = [[f"{i:0{digits}d}" for i in range(self.count)]]
        for condition in self.conditions:
            names = [safe_name(name, _NAME // len(self.conditions)) for name in condition.names]
            parts.append([names[place] for place in condition.which])
        return ["-".join(name) + ".png" for name in zip(*parts, strict=True)]

    def facts(self, index: int) -> dict[str, str]:
        """The conditions of one image, in words."""
        called = {"label": "class"}
        return {called.get(c.key, c.key): c.words[c.which[index]] for c in self.conditions}


def choose(
    model: LatentDiffusion,
    n: int,
    classes: str | None = None,
    image: Path | None = None,
    given: Sequence[str] = (),
) -> Wanted:
    """What to draw: `n` images, or `n` of each class, or of each image, or of each image with each class.

    `given` are KEY=VALUE words for what else the model reads, the same for every image.

    Raises:
        ValueError, FileNotFoundError: the model has no such condition, or another one; no such class; no such
            image, or none that can be read. In terms of what exists.
    """
    embedders: dict[str, Embedder] = {}
    for embedder in model.conditioner.embedders:
        embedders.setdefault(embedder.key, embedder)
    texts = _texts(embedders, given)
    labels = choose_labels(model, classes, n)
    row = n if labels is None else len(labels)
    conditions, pictures, places = [], None, [0]
    if "image" in embedders:
        pictures, places = _find(model, image)
        paths, stems = (
            map(pictures.path, range(len(pictures))),
            [PurePosixPath(p).stem for p in pictures.paths],
        )
        which = [place for place in places for _ in range(row)]
        conditions.append(Condition("image", list(paths), stems, which, partial(_pixels, pictures)))
    elif image is not None:
        raise ValueError(f"--image was given, but this model reads {_known(embedders)}")
    if labels is not None:
        names = class_names(model)
        conditions.append(Condition("label", names, names, labels * len(places), torch.tensor))
    count = row * len(places)
    for key, (text, value) in texts.items():
        conditions.append(Condition(key, [text], [text], [0] * count, partial(_repeated, value)))
    return Wanted(count, n, classes is not None, conditions, pictures)


def _option(embedder: Embedder) -> str | None:
    """The option that gives an embedder its values, None where no words can."""
    # An image that lies beside the latent is one to complete or to enlarge, not one to vary.
    if embedder.key == "label" or (embedder.key == "image" and embedder.kind != "concat"):
        return "--classes" if embedder.key == "label" else "--image"
    return "--condition" if type(embedder).from_text is not Embedder.from_text else None


def _known(embedders: dict[str, Embedder]) -> str:
    return ", ".join(f"{key} ({_option(e) or 'in Python'})" for key, e in embedders.items()) or "nothing"


def _texts(embedders: dict[str, Embedder], given: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """["size=64,64"] -> {"size": ("64,64", tensor)}, one for every key that is neither class nor image."""
    if mute := [key for key, e in embedders.items() if _option(e) is None]:
        raise ValueError(f"this model reads {some(mute)}, which no words can give: draw with ldm.draw")
    read = [key for key, e in embedders.items() if _option(e) == "--condition"]
    texts = {}
    for word in given:
        key, equals, text = word.partition("=")
        if not equals or key in texts:
            raise ValueError(f"--condition {word}: must be KEY=VALUE, once for each key")
        if key not in read:
            hint = did_you_mean(key, read)
            raise ValueError(f"--condition {word}: this model reads {_known(embedders)}{hint}")
        try:
            texts[key] = text, embedders[key].from_text(text)
        except ValueError as error:
            raise ValueError(f"--condition {word}: {error}") from error
    if missing := [key for key in read if key not in texts]:
        raise ValueError(f"this model reads {_known(embedders)}; give --condition {missing[0]}=VALUE")
    return texts


def _repeated(value: Any, places: list[int]) -> Any:
    """The batch of one value: a stack of tensors, or a list of anything else."""
    values = [value] * len(places)
    return torch.stack(values) if isinstance(value, Tensor) else values


def _pixels(pictures: Pictures, places: list[int]) -> Tensor:
    """Images (B, C, H, W) in [-1, 1]."""
    read = {place: pictures.pixels(place) for place in dict.fromkeys(places)}
    return normalize_pixels(torch.stack([read[place] for place in places]))


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
            for number in itertools.chain((first, last), range(first, last)):
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
    with progress_bar(len(pictures), "reading", shown=len(pictures) > FEW) as bar:
        for places, _ in pictures.batches(_AT_ONCE):
            readable += places
            bar.update(len(places))
    bad = [": ".join(pair) for pair in pictures.unreadable]
    if not readable:
        raise ValueError(f"no image of --image {image} can be read: {some(bad)}")
    for line in bad:
        log.warning("%s", line)
    return pictures, readable
