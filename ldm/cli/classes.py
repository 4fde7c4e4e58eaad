"""Which classes to draw, from the words of the command line."""

import re

from ldm.latent_diffusion import LatentDiffusion
from ldm.wording import nearest

_RANGE = re.compile(r"([0-9]+)\s*-\s*([0-9]+)")
_NUMBER = re.compile(r"[0-9]+")
_SHOWN = 30


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
        elif _NUMBER.fullmatch(token) and int(token) in by_number:
            labels.append(by_number[int(token)])
        elif span:
            labels.extend(_range(token, int(span[1]), int(span[2]), by_number, names))
        else:
            raise ValueError(_unknown(token, names))
    if not labels:
        raise ValueError(f"--classes {text!r} names no class")
    return labels


def _range(token: str, first: int, last: int, by_number: dict[int, int], names: list[str]) -> list[int]:
    if first > last:
        raise ValueError(f"--classes {token}: a range goes upwards, {last}-{first}")
    for number in (first, last):
        if number not in by_number:
            raise ValueError(_unknown(str(number), names))
    missing = next((number for number in range(first, last + 1) if number not in by_number), None)
    if missing is not None:
        raise ValueError(_unknown(str(missing), names))
    return [by_number[number] for number in range(first, last + 1)]


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


def safe_name(name: str, longest: int = 48) -> str:
    """A name as a part of a file's name on any system."""
    return re.sub(r"[^\w-]+", "_", name)[:longest] or "_"
