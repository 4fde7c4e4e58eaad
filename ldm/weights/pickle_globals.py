"""Which names a pickle may mention, construct and call; everything here is a table of strings.

The reader never imports or calls what a file names; this is about telling an honest file from a hostile one:

- *Mention*: any name outside Python's standard library may be mentioned, because old Lightning checkpoints
  use classes as dictionary keys. Of the standard library only the data types of `STANDARD_DATA` may: no
  honest checkpoint has a use for `posix.system`.
- *Construct* (the opcode NEWOBJ, or copyreg's two helpers, which create an object without calling its
  `__init__`): everything that may be mentioned; it becomes a `Placeholder`.
- *Call* (the opcode REDUCE): only what `ldm.weights.plain_values` makes values of, with functions of this
  project, and the names of `is_inert_call`, which become a `Placeholder`. Any other call is refused.
"""

import re
import sys

from ldm.weights.placeholders import GlobalName

# Names that moved: what Python 2 and other releases of numpy called them.
_MOVED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "_operator": "operator",
    "pathlib._abc": "pathlib",
    "pathlib._local": "pathlib",
}
_MOVED_NAMES = {"builtins.unicode": "str", "builtins.long": "int", "builtins.xrange": "range"}

# Removed from newer Pythons, or of Python 2, or not listed by `sys`.
_OLDER_STANDARD_LIBRARY = """
    asynchat asyncore cPickle cStringIO cgi commands crypt distutils exceptions imp nis os2 pipes popen2 smtpd
    StringIO telnetlib test _distutils_hack UserDict UserList UserString __builtin__ copy_reg
"""
_STANDARD_LIBRARY = frozenset(sys.stdlib_module_names) | frozenset(_OLDER_STANDARD_LIBRARY.split())

_STANDARD_DATA = """
    builtins: bool bytearray bytes complex dict float frozenset int list object range set slice str tuple type
    builtins: Ellipsis NoneType NotImplemented
    collections: Counter OrderedDict defaultdict deque
    collections.abc: Callable Iterable Mapping MutableMapping MutableSequence Sequence
    _codecs: encode
    copyreg: _reconstructor __newobj__
    argparse: Namespace
    types: SimpleNamespace NoneType
    pathlib: Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
    datetime: date datetime time timedelta timezone
    decimal: Decimal
    fractions: Fraction
    uuid: UUID SafeUUID
    functools: partial
    operator: getitem
    typing: Any Dict FrozenSet List Literal Mapping Optional Sequence Set Tuple Union
    dataclasses: _MISSING_TYPE _HAS_DEFAULT_FACTORY_CLASS
    inspect: _empty
"""
# `operator.getitem` is how `typing.Dict[str, int]` is stored.
STANDARD_DATA = frozenset(
    GlobalName(module.strip(), name)
    for module, _, names in (line.partition(":") for line in _STANDARD_DATA.split("\n"))
    for name in names.split()
)

# Paths, dates, numbers, identifiers, hyperparameters, types, layouts and versions, from plain values; a
# function with arguments bound (binding does not call it); the state of a random generator.
_INERT_CALLS = r"""
    pathlib\.\w*Path  datetime\.\w+  decimal\.Decimal  fractions\.Fraction  uuid\.(UUID|SafeUUID)
    types\.SimpleNamespace  argparse\.Namespace  functools\.partial  numpy\.dtype
    numpy\.random\._pickle\.__(randomstate|generator|bit_generator)_ctor
    torch\.serialization\._get_layout  torch\.torch_version\.TorchVersion
"""
_INERT = re.compile("|".join(_INERT_CALLS.split()))
# Enum members are stored as a call of the class with the member's value.
_ENUMS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|lightning_lite|omegaconf|torch\.optim)"
    r"(\.[a-z_]\w*)*(\.[A-Z]\w*)+"
)

_ON_THE_CPU = "tensors of this device are not read; save them on the CPU"
UNSUPPORTED_CALLS: dict[str, str] = {
    "torch._utils._rebuild_qtensor": "quantized tensors are not read",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors are not read",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse tensors are not read",
    "torch._utils._rebuild_nested_tensor": "nested tensors are not read",
    "torch._utils._rebuild_wrapper_subclass": "tensor subclasses that wrap others are not read",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device has no data",
    "torch._utils._rebuild_device_tensor_from_numpy": _ON_THE_CPU,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _ON_THE_CPU,
}


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
        return name in STANDARD_DATA
    *outer, last = name.name.split(".")
    # `torch.serialization` + `os.system` is os.system by another road; so is anything through a dunder.
    through = [*name.module.split(".")[1:], *outer]
    dunder = any(part.startswith("__") and part.endswith("__") for part in (*through, last))
    return not dunder and not any(part in _STANDARD_LIBRARY for part in outer)


def is_inert_call(name: GlobalName, arguments: tuple) -> bool:
    """Whether a call of this name only stores data, so that a placeholder can stand for it."""
    if _ENUMS.fullmatch(str(name)):
        return len(arguments) == 1 and type(arguments[0]) in (str, int)
    return bool(_INERT.fullmatch(str(name)))
