"""Counts and lists of names in messages."""


def counted(count: int, thing: str, things: str | None = None) -> str:
    """`1 image`, `1,234 images`; `things` is the plural where an "s" does not make it."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def some(names: list[str], count: int = 5) -> str:
    """The first names of a list, those that hold a comma in quotes, and how many more there are."""
    shown = [f'"{name}"' if "," in name else name for name in names[:count]]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(shown) + more
