"""Which names a pickle may mention, construct and call; everything here is a table of strings.

The reader never imports or calls what a file names; this is about telling an honest file from a hostile one:

- *Mention*: any name outside Python's standard library may be mentioned, because old Lightning checkpoints
  use classes as dictionary keys. Of the standard library only the data types of `STANDARD_DATA` may: no
  honest checkpoint has a use for `posix.system`.
- *Construct* (the opcode NEWOBJ, or copyreg's helper, which create an object without calling its
  `__init__`): everything that may be mentioned; it becomes a `Placeholder`.
- *Call* (the opcode REDUCE): only what `ldm.weights.plain_values` makes values of, with functions of this
  project, and the names of `is_inert_call`, which become a `Placeholder`. Any other call is refused.
"""

import re
import sys

from ldm.weights.stand_ins import GlobalName

# Names that moved: what Python 2 and other releases of numpy called them.
_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg", "_operator": "operator"}
_MOVED |= {"pathlib._abc": "pathlib", "pathlib._local": "pathlib"}
_MOVED_NAMES = {"builtins.unicode": "str", "builtins.long": "int", "builtins.xrange": "range"}

# Removed from newer Pythons, or of Python 2, or not listed by `sys`.
_OLDER_STANDARD_LIBRARY = """
    asynchat asyncore cPickle cStringIO cgi commands crypt distutils exceptions imp nis os2 pipes popen2 smtpd
    StringIO telnetlib test _distutils_hack UserDict UserList UserString __builtin__ copy_reg
"""
_STANDARD_LIBRARY = frozenset(sys.stdlib_module_names) | frozenset(_OLDER_STANDARD_LIBRARY.split())

_STANDARD_DATA = r"""
    builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple|type)
    builtins\.(Ellipsis|NoneType|NotImplemented)  types\.(SimpleNamespace|NoneType)  argparse\.Namespace
    collections\.(Counter|OrderedDict|defaultdict|deque)  (collections\.abc|typing)\.[A-Z]\w+
    pathlib\.\w*Path  datetime\.(date|datetime|time|timedelta|timezone)  decimal\.Decimal  fractions\.Fraction
    uuid\.(UUID|SafeUUID)  functools\.partial  operator\.getitem  _codecs\.encode  copyreg\._reconstructor
    dataclasses\.(_MISSING_TYPE|_HAS_DEFAULT_FACTORY_CLASS)  inspect\._empty
"""
# Dates, numbers, identifiers, types and layouts, from plain values; a function with arguments bound (binding
# does not call it); `typing.Dict[str, int]`, which is stored as getitem; the state of a random generator.
_INERT_CALLS = r"""
    datetime\.\w+  decimal\.Decimal  fractions\.Fraction  uuid\.(UUID|SafeUUID)  functools\.partial
    builtins\.slice  operator\.getitem  pathlib\.PureWindowsPath  numpy\.dtype
    numpy\.random\._pickle\.__(randomstate|generator|bit_generator)_ctor  torch\.serialization\._get_layout
"""
STANDARD_DATA, _INERT = (re.compile("|".join(names.split())) for names in (_STANDARD_DATA, _INERT_CALLS))
# Enum members are stored as a call of the class with the member's value.
_ENUMS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|lightning_lite|omegaconf|torch\.optim)"
    r"(\.[a-z_]\w*)*(\.[A-Z]\w*)+"
)

# Quantized, sparse, nested and wrapped tensors, and those that have no data or are of other devices.
UNREAD_TENSORS = re.compile(r"torch\._utils\._rebuild_(qtensor|sparse|nested|wrapper|meta|device)\w*")


def normalised(module: str, name: str) -> GlobalName:
    """One spelling for what other releases of Python and numpy call differently."""
    module = _MOVED.get(module, module)
    if module == "numpy._core" or module.startswith("numpy._core."):
        module = "numpy.core" + module[len("numpy._core") :]
    return GlobalName(module, _MOVED_NAMES.get(f"{module}.{name}", name))


def may_mention(name: GlobalName) -> bool:
    """Whether an honest checkpoint can hold this name at all."""
    root = name.module.partition(".")[0]
    if root in _STANDARD_LIBRARY:
        return STANDARD_DATA.fullmatch(str(name)) is not None
    *outer, last = name.name.split(".")
    # `torch.serialization` + `os.system` is os.system by another road; so is anything through a dunder.
    through = [*name.module.split(".")[1:], *outer]
    dunder = any(part.startswith("__") and part.endswith("__") for part in (*through, last))
    return not dunder and not any(part in _STANDARD_LIBRARY for part in outer)


def is_inert_call(name: GlobalName, arguments: tuple) -> bool:
    """Whether a call of this name only stores data, so that a placeholder can stand for it."""
    if _ENUMS.fullmatch(str(name)):
        return len(arguments) == 1 and type(arguments[0]) in (str, int)
    return _INERT.fullmatch(str(name)) is not None
