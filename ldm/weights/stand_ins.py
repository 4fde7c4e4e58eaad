"""What stands for the names and objects of a pickle, while Python's unpickler is at work and afterwards.

The unpickler's stack never holds anything but plain values (None, numbers, text, bytes, tuples, lists, dicts,
sets), `Name`s and `Described` objects. Whatever the C code does to an object on behalf of a pickle therefore
ends in one of these two classes:

| operation | what the unpickler does | what answers |
|---|---|---|
| GLOBAL, STACK_GLOBAL, INST | `find_class` | a `Name`, or a refusal |
| REDUCE, OBJ, INST | calls the object | `Name.__call__`, `Described.__call__` |
| NEWOBJ, NEWOBJ_EX, OBJ without arguments | `cls.__new__` of a type | `construct` |
| BUILD | `__setstate__` (else `__dict__` and `setattr`) | `Name.__setstate__`, `Described.__setstate__` |
| APPEND, APPENDS | `extend` | `Name.extend`, `Described.extend` |
| SETITEM, SETITEMS | `__setitem__` | `Name.__setitem__`, `Described.__setitem__` |
| ADDITEMS | `add` | nothing: only a set has it |
| PERSID, BINPERSID | `persistent_load` | a `StoredStorage`, or an error |
| EXT1, EXT2, EXT4, LONG4 | | refused before, in `pickle_scan` |

There is no `slice`, tensor or array on the stack: assigning a list to a slice of itself thirty times, or
adding tensors that broadcast, would fill any memory. `plain_values` makes those afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ldm.weights.pickle_scan import Budget

_STEPS_OF_AN_OBJECT = 5


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


class Name(type):
    """The class of stand-in classes: a name in a pickle, as a type because NEWOBJ demands one."""

    kind: GlobalName
    budget: Budget
    answer: Callable[[GlobalName, tuple], Any]  # to a call

    def __call__(cls, *arguments: Any) -> Any:
        return cls.answer(cls.kind, arguments)

    def _refuse(cls, *_: Any) -> None:
        raise cls.budget.refusal(cls.kind, "changes")

    __setstate__ = __setitem__ = extend = _refuse


def construct(cls: Name, *arguments: Any, **keywords: Any) -> "Described":
    """`__new__` of every stand-in class: makes an object without calling its class's `__init__`."""
    if keywords:
        raise cls.budget.refusal(cls.kind, "constructs with keywords")
    return Described(cls.budget, cls.kind, arguments)


class Described(Placeholder):
    """A placeholder in the making."""

    def __init__(self, budget: Budget, kind: GlobalName, arguments: tuple):
        budget.spend(_STEPS_OF_AN_OBJECT + len(arguments))
        super().__init__(kind, arguments)
        self._budget = budget

    def __setstate__(self, state: Any) -> None:
        # A method planted by one BUILD (`__setstate__`, say) is called by the next, or by Python itself.
        parts = state if isinstance(state, tuple) else (state,)
        attributes = [part for part in parts if isinstance(part, dict)]
        self._budget.spend(len(parts) + sum(map(len, attributes)))
        for key, value in (item for part in attributes for item in part.items()):
            planted = isinstance(value, Name | Described) and isinstance(key, str)
            if planted and key.startswith("__") and key.endswith("__"):
                raise self._budget.refusal(name_of(value), f"plants as a method {key[:40]!r}")
        if self.state is not None:
            raise self._budget.refusal(self.kind, "sets the state twice of")
        self.state = state

    def extend(self, values: list) -> None:
        self.items.extend(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.mapping[key] = value

    def __call__(self, *arguments: Any) -> None:
        raise self._budget.refusal(self.kind, "calls what it made from")


class StoredStorage(Described):
    """Memory of tensors. `arguments`: key, number of elements, and (key, offset, size) of a view or None."""


def name_of(value: Any) -> str:
    """What to call a value from a file in a message; never its contents, which may be endless."""
    if isinstance(value, Name | Placeholder):
        return str(value.kind)
    return str(value) if isinstance(value, GlobalName) else type(value).__name__
