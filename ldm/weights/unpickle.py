"""Python's own unpickler, with every door closed: it builds a description of what a pickle holds."""

import pickle
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, BinaryIO

from ldm.weights.errors import UnsupportedCheckpoint
from ldm.weights.pickle_globals import UNREAD_TENSORS, is_inert_call, may_mention, normalised
from ldm.weights.pickle_scan import Budget, scan
from ldm.weights.plain_values import has_value
from ldm.weights.stand_ins import Described, GlobalName, Name, StoredStorage, construct, name_of

_MAX_NAME = 1000
_STEPS_OF_A_NAME = 1000

# Key of a storage -> its type, number of elements.
StoredKinds = dict[str, tuple[GlobalName, int]]


def describe(file: BinaryIO, budget: Budget, inert: Sequence[str] = ()) -> tuple[Any, StoredKinds]:
    """The pickle that begins where `file` stands, without tensors and without anything of it being called.

    Args:
        inert: patterns (`fnmatch`) of full names whose calls are known to be data.

    Returns:
        plain values, `Name`s and `Described` objects, for `ldm.weights.plain_values`; the storages they use.

    Raises:
        UnsafeCheckpoint: it asks for code to be run; nothing was.
        UnsupportedCheckpoint: it holds a kind of tensor that is not read.
        CorruptCheckpoint: it is truncated, damaged or absurd.
    """
    with budget.blamed_on_the_file():
        start = file.tell()
        scan(file, budget)
        end = file.tell()
        file.seek(start)
        reader = _Unpickler(file, budget, inert)
        root = reader.load()
        file.seek(end)
        return root, reader.storages


class _Unpickler(pickle.Unpickler):
    """Calls nothing but the methods of this class, `Name` and `Described` (see `ldm.weights.stand_ins`)."""

    def __init__(self, file: BinaryIO, budget: Budget, inert: Sequence[str]):
        # Python 2's `str` is text where it is UTF-8; what is not comes back as bytes in `plain_values`.
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.storages: StoredKinds = {}
        self._budget = budget
        self._inert = tuple(inert)
        self._names: dict[GlobalName, Name] = {}

    def find_class(self, module: str, name: str) -> Name:
        """What stands for a global: never the thing itself."""
        possible = len(module) + len(name) <= _MAX_NAME and (module + name).isprintable()
        self._budget.require(possible, "a global with an impossible name")
        kind = normalised(module, name)
        if kind not in self._names:
            if not may_mention(kind) and not self._declared_inert(kind):
                raise self._budget.refusal(kind, "names")
            self._budget.spend(_STEPS_OF_A_NAME)
            body = {"__new__": construct, "kind": kind, "budget": self._budget, "answer": self._call}
            self._names[kind] = Name("Name", (), body)
        return self._names[kind]

    def _declared_inert(self, kind: GlobalName) -> bool:
        return any(fnmatchcase(str(kind), pattern) for pattern in self._inert)

    def _call(self, kind: GlobalName, arguments: tuple) -> Any:
        """A call that the pickle asks for: its description, or a refusal."""
        match str(kind), arguments:
            case "copyreg._reconstructor", (Name() as cls, base, state):  # the older form of NEWOBJ
                if not isinstance(base, Name) or base.kind.module != "builtins":
                    raise self._budget.refusal(name_of(base), "initialises an object through")
                return construct(cls) if state is None else construct(cls, state)
            case "builtins.type", (None,):
                return self.find_class("builtins", "NoneType")
        if UNREAD_TENSORS.fullmatch(str(kind)):
            raise UnsupportedCheckpoint(self._budget.where, f"holds tensors that are not read, of {kind}")
        if has_value(kind) or is_inert_call(kind, arguments) or self._declared_inert(kind):
            return Described(self._budget, kind, arguments)
        hint = f"; if it is data of yours (a member of an Enum, say), inert=['{kind}'] reads it as a stand-in"
        raise self._budget.refusal(kind, "calls", hint if may_mention(kind) else "")

    def persistent_load(self, identity: Any) -> Any:
        """("storage", type, key, device, number of elements[, view]); in old files also a module's class."""
        match identity:
            case ("module", Name() as kind, _, _):
                return kind  # the source code beside it is ignored
            case ("storage", Name() as cls, str() as key, _, int() as count, *view) if len(view) < 2:
                self.storages.setdefault(key, (cls.kind, count))
                return StoredStorage(self._budget, cls.kind, (key, count, *view, None)[:3])
        raise self._budget.damaged("a persistent object that is no storage")
