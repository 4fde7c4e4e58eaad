"""Counts, lists and nearest names in messages, and the check of a choice."""

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
    """The option that `name` is a mistyping of, upper and lower case alike; None where none is near.

    Near is one typo, two from 8 letters on and three from 12 on; words of two letters have none.
    """
    name, found = str(name).lower(), {}
    for option in map(str, options):
        longer, lengths_differ = max(len(name), len(option)), abs(len(name) - len(option))
        allowed = min(max(longer // 4, 1), 3) if longer > 2 else 0
        typos = _typos(name, option.lower()) if lengths_differ <= allowed else lengths_differ
        if typos <= allowed:
            found[option] = typos
    return min(found, key=found.get, default=None)


def _typos(a: str, b: str) -> int:
    """Letters inserted, left out, mistaken, or swapped with their neighbour (optimal string alignment)."""
    above, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        two_above, above, row = above, row, [i]
        for j, y in enumerate(b, 1):
            count = min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y))
            if i > 1 and j > 1 and (x, a[i - 2]) == (b[j - 2], y):
                count = min(count, two_above[j - 2] + 1)
            row.append(count)
    return row[-1]


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
