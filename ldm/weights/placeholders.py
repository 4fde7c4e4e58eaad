"""What stands in a result for what a pickle names and this reader does not build."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GlobalName:
    """The name of something in a Python module, as two strings. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Placeholder:
    """An object of a foreign class, as the file describes it: its class's name and its data, no behaviour.

    Attributes:
        kind: the class's name.
        arguments: what the class would have been constructed with.
        state: what its attributes would have been set from (usually a dict), or None.
        items, mapping: what a list or dict subclass would have held.
    """

    kind: GlobalName
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)
    mapping: dict = field(default_factory=dict)

    def __repr__(self) -> str:  # short on purpose: the state may be huge or refer to itself
        return f"<Placeholder for {self.kind}>"


def name_of(value: Any) -> str:
    """What to call a value from a file in a message; never its contents, which may be endless."""
    if isinstance(value, GlobalName):
        return str(value)
    return str(value.kind) if isinstance(value, Placeholder) else type(value).__name__
