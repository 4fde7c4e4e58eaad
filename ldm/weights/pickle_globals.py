"""Which names a pickle may mention, construct and call; everything here is a table of strings.

The reader never imports or calls what a file names; this is about telling an honest file from a hostile one:

- *Mention*: any name outside Python's standard library may be mentioned, because old Lightning checkpoints
  use classes as dictionary keys. Of the standard library only the data types of `STANDARD_DATA` may: no
  honest checkpoint has a use for `posix.system`.
- *Construct* (the opcode NEWOBJ, or copyreg's two helpers, which create an object without calling its
  `__init__`): everything that may be mentioned; it becomes a `Placeholder`.
- *Call* (the opcode REDUCE): only the builders of `pickle_builders`, which are this project's own functions,
  and the names of `INERT_CALLS`, which become a `Placeholder`. Any other call is refused.
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

_STANDARD_LIBRARY = frozenset(sys.stdlib_module_names) | {
    # Removed from newer Pythons, or of Python 2, or not listed there.
    *(
        "asynchat",
        "asyncore",
        "cPickle",
        "cStringIO",
        "cgi",
        "commands",
        "crypt",
        "distutils",
        "exceptions",
        "imp",
    ),
    *("nis", "os2", "pipes", "popen2", "smtpd", "StringIO", "telnetlib", "test", "_distutils_hack"),
    *("UserDict", "UserList", "UserString", "__builtin__", "copy_reg"),
}

STANDARD_DATA: dict[str, tuple[str, ...]] = {
    "builtins": (
        *(
            "bool",
            "bytearray",
            "bytes",
            "complex",
            "dict",
            "float",
            "frozenset",
            "int",
            "list",
            "object",
            "range",
        ),
        *("set", "slice", "str", "tuple", "type", "Ellipsis", "NoneType", "NotImplemented"),
    ),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "collections.abc": ("Callable", "Iterable", "Mapping", "MutableMapping", "MutableSequence", "Sequence"),
    "_codecs": ("encode",),
    "copyreg": ("_reconstructor", "__newobj__"),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace", "NoneType"),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID", "SafeUUID"),
    "functools": ("partial",),
    "operator": ("getitem",),  # how `typing.Dict[str, int]` is stored
    "typing": (
        "Any",
        "Dict",
        "FrozenSet",
        "List",
        "Literal",
        "Mapping",
        "Optional",
        "Sequence",
        "Set",
        "Tuple",
        "Union",
    ),
    "dataclasses": ("_MISSING_TYPE", "_HAS_DEFAULT_FACTORY_CLASS"),
    "inspect": ("_empty",),
}

INERT_CALLS: dict[str, str] = {
    r"pathlib\.\w*Path": "a path, from its parts",
    r"datetime\.\w+": "a date or a duration, from numbers",
    r"decimal\.Decimal|fractions\.Fraction": "a number, from text",
    r"uuid\.(UUID|SafeUUID)": "an identifier",
    r"types\.SimpleNamespace|argparse\.Namespace": "hyperparameters",
    r"functools\.partial": "a function with arguments bound; binding does not call it",
    r"numpy\.dtype": "an element type",
    r"numpy\.random\._pickle\.__(randomstate|generator|bit_generator)_ctor": "a random generator",
    r"torch\.serialization\._get_layout": "the layout of a tensor, from its name",
    r"torch\.torch_version\.TorchVersion": "a version, from text",
}

# Enum members are stored as a call of the class with the member's value.
_ENUMS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|lightning_lite|omegaconf|torch\.optim)"
    r"(\.[a-z_]\w*)*(\.[A-Z]\w*)+"
)
_INERT = re.compile("|".join(f"(?:{pattern})" for pattern in INERT_CALLS))

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
        return name.name in STANDARD_DATA.get(name.module, ())
    *outer, last = name.name.split(".")
    # `torch.serialization` + `os.system` is os.system by another road; so is anything through a dunder.
    through = [*name.module.split(".")[1:], *outer]
    dunder = any(part.startswith("__") and part.endswith("__") for part in (*through, last))
    return not dunder and not any(part in _STANDARD_LIBRARY for part in outer)


def is_inert_call(name: GlobalName, arguments: tuple) -> bool:
    """Whether a call of this name stores data (see `INERT_CALLS`), so that a placeholder can stand for it."""
    if str(name) == "operator.getitem":
        return bool(arguments) and isinstance(arguments[0], GlobalName) and arguments[0].module == "typing"
    if _ENUMS.fullmatch(str(name)):
        return len(arguments) == 1 and type(arguments[0]) in (str, int)
    return bool(_INERT.fullmatch(str(name)))
