"""Python's own unpickler, with every door closed: it builds a description of what a pickle holds.

The stack of the unpickler never holds anything but plain values (None, numbers, text, bytes, tuples, lists,
dicts, sets), `Name`s and `Described` objects. Whatever the C code does to an object on behalf of a pickle
therefore ends in one of these two classes:

| operation | what the unpickler does | what answers |
|---|---|---|
| GLOBAL, STACK_GLOBAL, INST | `find_class` | a `Name`, or a refusal |
| REDUCE, OBJ, INST | calls the object | `Name.__call__`, `Described.__call__` |
| NEWOBJ, NEWOBJ_EX, OBJ without arguments | `cls.__new__` of a type | `_construct` |
| BUILD | `__setstate__` (else `__dict__` and `setattr`) | `Name.__setstate__`, `Described.__setstate__` |
| APPEND, APPENDS | `extend` | `Name.extend`, `Described.extend` |
| SETITEM, SETITEMS | `__setitem__` | `Name.__setitem__`, `Described.__setitem__` |
| ADDITEMS | `add` | nothing: only a set has it |
| PERSID, BINPERSID | `persistent_load` | a `StoredStorage`, or an error |
| EXT1, EXT2, EXT4, NEXT_BUFFER, ... | | refused before, in `pickle_scan` |

There is no `slice`, tensor or array on the stack: assigning a list to a slice of itself thirty times, or
adding tensors that broadcast, would fill any memory. `plain_values` makes those afterwards.
"""

import io
import pickle
from collections.abc import Container, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ldm.weights.budget import Budget
from ldm.weights.errors import UnsupportedCheckpoint
from ldm.weights.mapped import ByteReader
from ldm.weights.pickle_globals import UNSUPPORTED_CALLS, is_inert_call, may_mention, normalised
from ldm.weights.pickle_scan import scan
from ldm.weights.placeholders import GlobalName

_MAX_NAME = 1000
_MAX_NAMES = 10_000
_STEPS_OF_AN_OBJECT = 5


class Name(type):
    """The class of stand-in classes: a name in a pickle, as a type because NEWOBJ demands one."""

    full: GlobalName
    reader: "_Unpickler"

    def __call__(cls, *arguments: Any) -> Any:
        return cls.reader.call(cls.full, arguments)

    def __setstate__(cls, state: Any) -> None:
        raise cls.reader.budget.refusal(cls.full, "sets attributes of")

    def __setitem__(cls, key: Any, value: Any) -> None:
        raise cls.reader.budget.refusal(cls.full, "sets items of")

    def extend(cls, values: list) -> None:
        raise cls.reader.budget.refusal(cls.full, "adds elements to")


def _construct(cls: Name, *arguments: Any, **keywords: Any) -> "Described":
    """`__new__` of every stand-in class: makes an object without calling its class's `__init__`."""
    if keywords:
        raise cls.reader.budget.refusal(cls.full, "constructs with keywords")
    return Described(cls.reader.budget, cls.full, arguments)


class Described:
    """An object as the pickle describes it; the attributes are those of a `Placeholder`."""

    __slots__ = ("_budget", "arguments", "items", "kind", "mapping", "state")

    def __init__(self, budget: Budget, kind: GlobalName, arguments: tuple):
        budget.spend(_STEPS_OF_AN_OBJECT + len(arguments))
        self._budget = budget
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None
        self.items: list = []
        self.mapping: dict = {}

    def __setstate__(self, state: Any) -> None:
        # A method planted by one BUILD (`__setstate__`, say) is called by the next, or by Python itself.
        parts = state if isinstance(state, tuple) else (state,)
        self._budget.spend(len(parts))
        for part in parts:
            attributes = part if isinstance(part, dict) else {}
            self._budget.spend(len(attributes))
            for key, value in attributes.items():
                planted = isinstance(value, Name | Described)
                if planted and isinstance(key, str) and key.startswith("__") and key.endswith("__"):
                    raise self._budget.refusal(described_name(value), f"plants as a method {key[:40]!r}")
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

    __slots__ = ()


def described_name(value: Any) -> str:
    if isinstance(value, Name):
        return str(value.full)
    return str(value.kind) if isinstance(value, Described) else type(value).__name__


@dataclass(frozen=True)
class Description:
    """What a pickle holds; it ends before the byte `end`.

    `storages`: key -> name of the type, number of elements.
    """

    root: Any
    storages: dict[str, tuple[GlobalName, int]]
    end: int


def describe(
    view: memoryview,
    budget: Budget,
    position: int = 0,
    *,
    callables: Container[str] = (),
    inert: Sequence[str] = (),
) -> Description:
    """The pickle in `view` from `position` on, without tensors and without anything of it being called.

    Args:
        callables: the full names whose calls are described, like those of `is_inert_call`.
        inert: patterns (`fnmatch`) of further full names that are known to be data.

    Raises:
        UnsafeCheckpoint: it asks for code to be run; nothing was.
        UnsupportedCheckpoint: it holds a kind of tensor that is not read.
        CorruptCheckpoint: it is truncated, damaged or absurd.
    """
    with budget.blamed_on_the_file():
        end = scan(ByteReader(view, position), budget)
        budget.read += end - position
        reader = _Unpickler(view[position:end], budget, callables, inert)
        return Description(reader.load(), reader.storages, end)


class _Unpickler(pickle.Unpickler):
    """Calls nothing but the methods of this class, `Name` and `Described`."""

    def __init__(self, pickled: memoryview, budget: Budget, callables: Container[str], inert: Sequence[str]):
        # Python 2's `str` is text where it is UTF-8; what is not comes back as bytes in `plain_values`.
        super().__init__(io.BytesIO(pickled), encoding="utf-8", errors="surrogateescape")
        self.budget = budget
        self.storages: dict[str, tuple[GlobalName, int]] = {}
        self._callables = callables
        self._inert = tuple(inert)
        self._names: dict[GlobalName, Name] = {}

    def find_class(self, module: str, name: str) -> Name:
        """What stands for a global: never the thing itself."""
        if len(module) + len(name) > _MAX_NAME or not (module + name).isprintable():
            raise self.budget.damaged("a global with an impossible name")
        full = normalised(module, name)
        if full not in self._names:
            if not may_mention(full) and not self._declared_inert(full):
                raise self.budget.refusal(full, "names")
            if len(self._names) == _MAX_NAMES:
                raise self.budget.damaged(f"more than {_MAX_NAMES} names")
            body = {"__slots__": (), "__new__": _construct, "full": full, "reader": self}
            self._names[full] = Name("Name", (), body)
        return self._names[full]

    def _declared_inert(self, full: GlobalName) -> bool:
        return any(fnmatchcase(str(full), pattern) for pattern in self._inert)

    def call(self, full: GlobalName, arguments: tuple) -> Any:
        """A call that the pickle asks for: its description, or a refusal."""
        name = str(full)
        if name == "copyreg.__newobj__" and arguments and isinstance(arguments[0], Name):
            return _construct(*arguments)
        if name == "copyreg._reconstructor" and len(arguments) == 3 and isinstance(arguments[0], Name):
            return self._reconstruct(*arguments)
        if name == "builtins.type" and arguments == (None,):
            return self.find_class("builtins", "NoneType")
        if name in UNSUPPORTED_CALLS:
            raise UnsupportedCheckpoint(self.budget.where, f"{UNSUPPORTED_CALLS[name]} ({name})")
        of_typing = name == "operator.getitem" and described_name((*arguments, None)[0]).startswith("typing.")
        known = name in self._callables or is_inert_call(full, arguments)
        if of_typing or known or self._declared_inert(full):
            return Described(self.budget, full, arguments)
        hint = f"; if it is data of yours (a member of an Enum, say), inert=[{name!r}] reads it as a stand-in"
        raise self.budget.refusal(full, "calls", hint if may_mention(full) else "")

    def _reconstruct(self, kind: Name, base: Any, value: Any) -> "Described":
        """`copyreg._reconstructor(class, base, state)`, the older form of NEWOBJ."""
        if not isinstance(base, Name) or base.full.module != "builtins":
            raise self.budget.refusal(described_name(base), "initialises an object through")
        return Described(self.budget, kind.full, () if value is None else (value,))

    def persistent_load(self, identity: Any) -> Any:
        """("storage", type, key, device, number of elements[, view]); in old files also a module's class."""
        match identity:
            case ("module", Name() as kind, _, _):
                return kind  # the source code beside it is ignored
            case ("storage", Name() as kind, str() as key, _, int() as count, *view) if len(view) < 2:
                self.storages.setdefault(key, (kind.full, count))
                return StoredStorage(self.budget, kind.full, (key, count, *view, None)[:3])
            case _:
                raise self.budget.damaged("a persistent object that is no storage")
