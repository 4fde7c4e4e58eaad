"""An unpickler that builds tensors and plain containers, and nothing else.

It interprets the opcodes of pickle protocols 0 to 5 (documented in Python's `pickletools`) itself: nothing is
imported, looked up by name, or called, other than the functions of `pickle_builders`. See `pickle_globals`
for what becomes a placeholder and what is refused.
"""

import struct
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from ldm.weights.pickle_builders import BUILDERS, checked_key
from ldm.weights.pickle_globals import UNSUPPORTED_CALLS, is_inert_call, may_mention, normalised
from ldm.weights.pickle_opcodes import OPCODES, STOP
from ldm.weights.placeholders import GlobalName, Placeholder, StoredStorage, name_of
from ldm.weights.tensor_builders import DTYPES, STORAGE_DTYPES

# The largest published training states need some 10^5 steps; each step costs at most about a hundred bytes.
MAX_STEPS = 10_000_000
_MAX_NAME = 1000
_PLAIN_DICTS = ("builtins.dict", "collections.OrderedDict", "collections.defaultdict", "collections.Counter")

# (key, type of the elements, number of elements, (key of a view, its offset, its size) or None) -> memory
StorageLoader = Callable[[str, torch.dtype, int, tuple | None], torch.UntypedStorage]


def no_storages(key: str, dtype: torch.dtype, count: int, view: tuple | None) -> torch.UntypedStorage:
    """A `StorageLoader` for pickles that have no business holding tensors."""
    raise KeyError(key)


class Unpickler:
    """Reads one pickle after another from a buffer.

    Args:
        data: the bytes.
        where: the file's name, for messages.
        load_storage: where the tensors' memory comes from.
        inert: patterns (`fnmatch`) of further full names, such as "myproject.modes.Mode", that are known to
            be data: mentions and calls of them become placeholders too.
        position: where to start.

    Attributes:
        position: the first byte after the last pickle read.
    """

    def __init__(
        self,
        data: memoryview | bytes,
        where: str,
        load_storage: StorageLoader = no_storages,
        inert: Sequence[str] = (),
        position: int = 0,
    ):
        self.data = memoryview(data)
        self.where = where
        self.load_storage = load_storage
        self.inert = tuple(inert)
        self.position = position
        self._steps = 0
        self._bytes_made = 0

    def load(self) -> Any:
        """The next object in the buffer.

        Raises:
            UnsafeCheckpoint: it asks for code to be run; nothing was.
            UnsupportedCheckpoint: it holds a kind of tensor that is not read.
            CorruptCheckpoint: it is truncated, damaged or absurd.
        """
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        try:
            while True:
                code = self.take(1)[0]
                self.spend(1)
                if code == STOP:
                    return self.pop()
                handler = OPCODES.get(code)
                if handler is None:
                    raise CorruptCheckpoint(
                        self.where,
                        f"the pickle inside is damaged: byte {self.position - 1} is no known opcode",
                    )
                handler(self)
        except CheckpointError:
            raise
        except (ValueError, TypeError, LookupError, ArithmeticError, struct.error, RuntimeError) as error:
            raise CorruptCheckpoint(
                self.where, f"the pickle inside is damaged near byte {self.position}: {type(error).__name__}"
            ) from error

    def damaged(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            self.where, f"the pickle inside is damaged near byte {self.position}: {what}"
        )

    def spend(self, work: int) -> None:
        self._steps += work
        if self._steps > MAX_STEPS:
            raise CorruptCheckpoint(
                self.where, f"the pickle inside has more than {MAX_STEPS} objects; this is absurd"
            )

    def spend_bytes(self, count: int) -> None:
        # An honest pickle makes bytes from text that it holds once; a bomb makes them over and over.
        self._bytes_made += count
        if self._bytes_made > len(self.data):
            raise CorruptCheckpoint(
                self.where, "the pickle inside expands to more bytes than it has; this is absurd"
            )

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        start = self.position
        if count < 0 or start + count > len(self.data):
            raise CorruptCheckpoint(
                self.where,
                f"the pickle inside ends at byte {len(self.data)} in the middle of a value: truncated?",
            )
        self.position = start + count
        return self.data[start : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Text up to the next line feed, of at most 4 KiB."""
        ahead = bytes(self.data[self.position : self.position + 4096])
        end = ahead.find(b"\n")
        if end < 0:
            raise self.damaged("a line without an end")
        self.position += end + 1
        return ahead[:end].decode("utf-8")

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damaged("an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damaged("an empty stack")
        return self.stack[-1]

    def is_declared_inert(self, name: GlobalName) -> bool:
        return any(fnmatchcase(str(name), pattern) for pattern in self.inert)

    def mention(self, module: Any, name: Any) -> Any:
        """What stands for a global: a type of tensor elements itself, or its name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.damaged("a global without a name")
        if len(module) + len(name) > _MAX_NAME:
            raise self.damaged("a global with an endless name")
        named = normalised(module, name)
        if named.module == "torch" and named.name in DTYPES:
            return DTYPES[named.name]
        if not may_mention(named) and not self.is_declared_inert(named):
            raise UnsafeCheckpoint(self.where, str(named), "names")
        return named

    def call(self, function: Any, arguments: Any) -> Any:
        """The opcode REDUCE: a builder's result, a placeholder, or a refusal."""
        if not isinstance(function, GlobalName):
            raise UnsafeCheckpoint(self.where, name_of(function), "calls what it made from")
        if not isinstance(arguments, tuple):
            raise self.damaged("a call without arguments")
        name = str(function)
        if name in BUILDERS:
            return BUILDERS[name](self, arguments)
        if name in UNSUPPORTED_CALLS:
            raise UnsupportedCheckpoint(self.where, f"{UNSUPPORTED_CALLS[name]} ({name})")
        if is_inert_call(function, arguments) or self.is_declared_inert(function):
            return Placeholder(function, arguments)
        hint = f" If it is data of yours (a member of an Enum, say), inert=[{name!r}] reads it as a stand-in."
        raise UnsafeCheckpoint(self.where, name, "calls", hint if may_mention(function) else "")

    def construct(self, kind: Any, arguments: Any) -> Any:
        """The opcode NEWOBJ: a plain container for those, a placeholder for every other class."""
        if not isinstance(kind, GlobalName):
            raise UnsafeCheckpoint(self.where, name_of(kind), "constructs an object of what it made from")
        if not isinstance(arguments, tuple):
            raise self.damaged("a class without arguments")
        if str(kind) in _PLAIN_DICTS:
            return {}
        return Placeholder(kind, arguments)

    def build(self, target: Any, state: Any) -> None:
        """The opcode BUILD: a placeholder records the state; attributes of plain containers are dropped."""
        if not isinstance(target, Placeholder | dict | list | set):
            raise UnsafeCheckpoint(self.where, name_of(target), "sets attributes of")
        # A method planted by one BUILD (`__setstate__`, say) is called by the next, or by Python itself.
        for part in state if isinstance(state, tuple) else (state,):
            attributes = part if isinstance(part, dict) else {}
            self.spend(len(attributes))
            for key, value in attributes.items():
                planted = isinstance(value, GlobalName | Placeholder)
                if planted and isinstance(key, str) and key.startswith("__") and key.endswith("__"):
                    raise UnsafeCheckpoint(self.where, name_of(value), f"plants as a method {key[:40]!r}")
        if isinstance(target, Placeholder):
            if target.state is not None:
                raise UnsafeCheckpoint(self.where, name_of(target), "sets the state twice of")
            target.state = state

    def persistent(self, identity: Any) -> Any:
        """("storage", type, key, device, number of elements[, view]); in old files also a module's class."""
        if not isinstance(identity, tuple) or not identity or identity[0] not in ("storage", "module"):
            raise self.damaged("a persistent object that is no storage")
        if identity[0] == "module":
            if len(identity) != 4 or not isinstance(identity[1], GlobalName):
                raise self.damaged("a module without a class")
            return identity[1]  # the source code beside it is ignored
        _, kind, key, _device, count, view = (*identity, None, None, None, None)[:6]
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, GlobalName) else None
        if dtype is None or kind.module.partition(".")[0] != "torch":
            raise UnsupportedCheckpoint(self.where, f"holds a storage of unknown type {name_of(kind)}")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**63 or len(identity) > 6:
            raise self.damaged("a storage without a key or a size")
        if view is not None and not (isinstance(view, tuple) and len(view) == 3):
            raise self.damaged("a view of a storage that is none")
        self.spend(10)
        return StoredStorage(self.load_storage(key, dtype, count, view), dtype)

    def append(self, target: Any, values: list) -> None:
        into = target.items if isinstance(target, Placeholder) else target
        if isinstance(target, GlobalName):
            raise UnsafeCheckpoint(self.where, name_of(target), "adds elements to")
        if not isinstance(into, list):
            raise self.damaged(f"elements for a {name_of(target)}")
        into.extend(values)

    def set_items(self, target: Any, flat: list) -> None:
        into = target.mapping if isinstance(target, Placeholder) else target
        if isinstance(target, GlobalName):
            raise UnsafeCheckpoint(self.where, name_of(target), "sets items of")
        if not isinstance(into, dict) or len(flat) % 2:
            raise self.damaged(f"keys and values for a {name_of(target)}")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            into[checked_key(self, key)] = value
