"""Counts, lists and nearest names in messages, and the check of a choice."""

import difflib
from collections.abc import Iterable
from typing import Any


def counted(count: int, thing: str, things: str | None = None) -> str:
    """`1 image`, `1,234 images`; `things` is the plural where an "s" does not make it."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def some(names: list[str], count: int = 5) -> str:
    """The first names of a list, those that hold a comma in quotes, and how many more there are."""
    shown = [f'"{name}"' if "," in name else name for name in names[:count]]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(shown) + more


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that `name` is a mistyping of, upper and lower case alike; None where none is near."""
    lower = {str(option).lower(): str(option) for option in options}
    # In three letters two may be right (`cta`, `cat`); `num_classes` is not near `num_channels`, 0.70.
    cutoff = 0.66 if len(str(name)) == 3 else 0.73
    found = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=cutoff)
    return lower[found[0]] if found else None


def did_you_mean(name: str, options: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?`, or nothing where no option is near."""
    found = nearest(name, options)
    return f"; did you mean {prefix}{found}?" if found else ""


def check_choice(name: str, value: Any, allowed: Iterable) -> None:
    """ValueError with what is `allowed`, where `value` is none of it; `name` says whose choice it is."""
    allowed = list(allowed)
    if value not in allowed:
        names = ", ".join(map(str, allowed)) or "nothing"
        raise ValueError(f"{name} is {value!r}, must be one of {names}{did_you_mean(value, allowed)}")
