"""Python's own unpickler, with every door closed: it builds a description of what a pickle holds.

It never imports or calls what a file names; its tables tell an honest file from a hostile one:

- *Mention*: any name outside Python's standard library may be mentioned, because old Lightning checkpoints
  use classes as dictionary keys. Of the standard library only the data types of `_STANDARD_DATA` may: no
  honest checkpoint has a use for `posix.system`.
- *Construct* (the opcode NEWOBJ, or copyreg's helper, which create an object without calling its
  `__init__`): everything that may be mentioned; it becomes a `Placeholder`.
- *Call* (the opcode REDUCE): only what `ldm.weights.plain_values` makes values of, with functions of this
  project, and the names of `_is_inert_call`, which become a `Placeholder`. Any other call is refused.
"""

import pickle
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, BinaryIO

from ldm.weights.errors import UnsupportedCheckpoint
from ldm.weights.pickle_scan import Budget, scan
from ldm.weights.plain_values import has_value
from ldm.weights.stand_ins import Described, GlobalName, Name, StoredStorage, construct, name_of

_MAX_NAME = 1000
_STEPS_OF_A_NAME = 1000

# Names that moved: what Python 2 and other releases of numpy called them.
_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg", "_operator": "operator"}
_MOVED |= {"pathlib._abc": "pathlib", "pathlib._local": "pathlib"}
_MOVED_NAMES = {"builtins.unicode": "str", "builtins.long": "int", "builtins.xrange": "range"}

# Removed from newer Pythons, or of Python 2, or not listed by `sys`.
_OLDER_STANDARD_LIBRARY = """
    asynchat asyncore cPickle cStringIO cgi commands crypt distutils exceptions imp nis os2 pipes popen2 smtpd
    StringIO telnetlib test _distutils_hack UserDict UserList UserString __builtin__ copy_reg
"""
_STANDARD_LIBRARY = sys.stdlib_module_names | set(_OLDER_STANDARD_LIBRARY.split())


def _one_of(patterns: str) -> re.Pattern:
    return re.compile("|".join(patterns.split()))


_STANDARD_DATA = _one_of(r"""
    builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple|type)
    builtins\.(Ellipsis|NoneType|NotImplemented)  types\.(SimpleNamespace|NoneType)  argparse\.Namespace
    collections\.(Counter|OrderedDict|defaultdict|deque)  (collections\.abc|typing)\.[A-Z]\w+
    pathlib\.\w*Path  datetime\.(date|datetime|time|timedelta|timezone)  decimal\.Decimal  fractions\.Fraction
    uuid\.(UUID|SafeUUID)  functools\.partial  operator\.getitem  _codecs\.encode  copyreg\._reconstructor
    dataclasses\.(_MISSING_TYPE|_HAS_DEFAULT_FACTORY_CLASS)  inspect\._empty
""")
# Dates, numbers, identifiers, types and layouts, from plain values; a function with arguments bound (binding
# does not call it); `typing.Dict[str, int]`, which is stored as getitem; the state of a random generator.
_INERT = _one_of(r"""
    datetime\.\w+  decimal\.Decimal  fractions\.Fraction  uuid\.(UUID|SafeUUID)  functools\.partial
    builtins\.slice  operator\.getitem  pathlib\.PureWindowsPath  numpy\.dtype
    numpy\.random\._pickle\.__(randomstate|generator|bit_generator)_ctor  torch\.serialization\._get_layout
""")
# Enum members are stored as a call of the class with the member's value.
_ENUMS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|lightning_lite|omegaconf|torch\.optim)"
    r"(\.[a-z_]\w*)*(\.[A-Z]\w*)+"
)

# Quantized, sparse, nested and wrapped tensors, and those that have no data or are of other devices.
_UNREAD_TENSORS = re.compile(r"torch\._utils\._rebuild_(qtensor|sparse|nested|wrapper|meta|device)\w*")

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
        kind = _normalised(module, name)
        if kind not in self._names:
            if not _may_mention(kind) and not self._declared_inert(kind):
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
        if _UNREAD_TENSORS.fullmatch(str(kind)):
            raise UnsupportedCheckpoint(self._budget.where, f"holds tensors that are not read, of {kind}")
        if has_value(kind) or _is_inert_call(kind, arguments) or self._declared_inert(kind):
            return Described(self._budget, kind, arguments)
        hint = f"; if it is data of yours (a member of an Enum, say), inert=['{kind}'] reads it as a stand-in"
        raise self._budget.refusal(kind, "calls", hint if _may_mention(kind) else "")

    def persistent_load(self, identity: Any) -> Any:
        """("storage", type, key, device, number of elements[, view]); in old files also a module's class."""
        match identity:
            case ("module", Name() as kind, _, _):
                return kind  # the source code beside it is ignored
            case ("storage", Name() as cls, str() as key, _, int() as count, *view) if len(view) < 2:
                self.storages.setdefault(key, (cls.kind, count))
                return StoredStorage(self._budget, cls.kind, (key, count, *view, None)[:3])
        raise self._budget.damaged("a persistent object that is no storage")


def _normalised(module: str, name: str) -> GlobalName:
    """One spelling for what other releases of Python and numpy call differently."""
    module = re.sub(r"^numpy\._core\b", "numpy.core", _MOVED.get(module, module))
    return GlobalName(module, _MOVED_NAMES.get(f"{module}.{name}", name))


def _may_mention(name: GlobalName) -> bool:
    """Whether an honest checkpoint can hold this name at all."""
    if name.module.partition(".")[0] in _STANDARD_LIBRARY:
        return _STANDARD_DATA.fullmatch(str(name)) is not None
    *outer, last = name.name.split(".")
    # `torch.serialization` + `os.system` is os.system by another road; so is anything through a dunder.
    through = [*name.module.split(".")[1:], *outer]
    dunder = any(part.startswith("__") and part.endswith("__") for part in (*through, last))
    return not dunder and not any(part in _STANDARD_LIBRARY for part in outer)


def _is_inert_call(name: GlobalName, arguments: tuple) -> bool:
    """Whether a call of this name only stores data, so that a placeholder can stand for it."""
    if _ENUMS.fullmatch(str(name)):
        return len(arguments) == 1 and type(arguments[0]) in (str, int)
    return _INERT.fullmatch(str(name)) is not None
