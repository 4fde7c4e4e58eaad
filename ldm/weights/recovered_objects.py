"""Objects that hold plain data, as plain values.

Recovered are Python's own containers, bytes and numbers, OmegaConf's containers and nodes (interpolations
stay text), `argparse.Namespace` and its like (dict), Lightning's AttributeDict (dict), devices, paths and
versions (text), numpy arrays and scalars of numbers, bools and text (arrays are read-only).

Every function takes a `PlainValues` and the description of an object, and gives its value, or the description
itself where it stays a placeholder. Arguments are what the file's author wanted them to be.
"""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.weights.unpickle import Described

if TYPE_CHECKING:
    from ldm.weights.plain_values import PlainValues

Recovery = Callable[["PlainValues", Described], Any]

_MAX_PATH = 4096
_MAX_DEVICE = 100
_OMEGACONF = re.compile(r"omegaconf\.(\w+\.)*(DictConfig|ListConfig|\w+Node)")
_MAPPINGS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|easydict)\.(\w+\.)*(AttributeDict|EasyDict)"
)
_DTYPE = re.compile(r"([biufc])(1|2|4|8|16)|([SU])(\d{1,5})|\?")


def recovery_of(value: Described) -> Recovery | None:
    name = str(value.kind)
    if _OMEGACONF.fullmatch(name):
        return _omegaconf
    return _mapping if _MAPPINGS.fullmatch(name) else RECOVER.get(name)


def _omegaconf(values: "PlainValues", value: Described) -> Any:
    state = value.state if isinstance(value.state, dict) else {}
    inside = [state[key] for key in ("_content", "_val") if key in state]
    return values(inside[0]) if inside else value


def _mapping(values: "PlainValues", value: Described) -> dict:
    return values.fill(value, value.mapping.items())


def _namespace(values: "PlainValues", value: Described) -> dict | Described:
    if value.arguments:
        return value
    return values.fill(value, value.state.items() if isinstance(value.state, dict) else ())


def _dict(values: "PlainValues", value: Described, skipped: int = 0) -> dict:
    (source,) = value.arguments[skipped:] or ((),)
    pairs = source.items() if isinstance(source, dict) else source
    values.budget.spend(len(source))
    return values.fill(value, [*pairs, *value.mapping.items()])


def _defaultdict(values: "PlainValues", value: Described) -> dict:
    return _dict(values, value, skipped=1)  # what it would make for missing keys is dropped


def _elements(kind: type) -> Recovery:
    def build(values: "PlainValues", value: Described) -> Any:
        source = value.arguments[0] if value.arguments else ()
        values.budget.spend(len(source))
        each = values.key if kind in (set, frozenset) else values
        return kind(map(each, [*source, *value.items]))

    return build


def _numbers(kind: type) -> Recovery:
    def build(values: "PlainValues", value: Described) -> Any:
        if not all(type(number) in (int, float, bool, type(None)) for number in value.arguments):
            raise values.budget.damaged(f"a {kind.__name__} made from something else than numbers")
        return kind(*value.arguments)

    return build


def _bytes(values: "PlainValues", value: Described) -> bytes | bytearray:
    """`bytes()`, `bytes(data)`, `bytearray(text, "latin-1")`, `codecs.encode(text, "latin1")`; no length."""
    data, encoding = (*value.arguments, "latin1")[:2] if value.arguments else (b"", "latin1")
    if isinstance(data, Described):  # a bytearray of protocol 2 is made from such a call
        data = values(data)
    if isinstance(data, bytes | bytearray):
        return data
    if not isinstance(data, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise values.budget.damaged("bytes made from something else than text")
    return values.encode(data, encoding)


def _device(values: "PlainValues", value: Described) -> str:
    """A device as text, such as "cuda:0"; where the weights go is the caller's choice, not the file's."""
    name = ":".join(str(part) for part in value.arguments if isinstance(part, str | int))
    if not 0 < len(name) <= _MAX_DEVICE:
        raise values.budget.damaged("a device without a name")
    return name


def _path(values: "PlainValues", value: Described) -> str | Described:
    parts = value.arguments
    if not parts or not all(isinstance(part, str) for part in parts) or sum(map(len, parts)) > _MAX_PATH:
        return value
    values.budget.spend(sum(map(len, parts)))
    first, *rest = parts
    return "/".join([first.rstrip("/"), *rest]) if rest else first


def _version(values: "PlainValues", value: Described) -> str | Described:
    return value.arguments[0] if value.arguments and isinstance(value.arguments[0], str) else value


def _dtype(value: Any) -> np.dtype | None:
    """A numpy type of numbers, bools or text; None for objects, records and the like."""
    if not isinstance(value, Described) or str(value.kind) != "numpy.dtype" or not value.arguments:
        return None
    code = value.arguments[0]
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        return None
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "="
    try:
        return np.dtype((order if order in ("<", ">", "=", "|") else "=") + code)
    except TypeError:  # "f1", say
        return None


def _array(values: "PlainValues", value: Described, shape: Any, dtype: Any, order: str, data: Any) -> Any:
    """An array of plain elements, or `value` where the rest does not describe one."""
    dtype, plain = _dtype(dtype), values(data)
    if isinstance(plain, str):  # of Python 2
        plain = values.encode(plain, "utf-8")
    if dtype is None or not isinstance(plain, bytes | bytearray):
        return value
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(size) is int for size in shape):
        return value
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(plain):
        return value
    if not plain:
        return np.zeros(shape, dtype) if 0 in shape else value
    return np.frombuffer(memoryview(plain).toreadonly(), dtype).reshape(shape, order=order)


def _array_from_state(values: "PlainValues", value: Described) -> Any:
    """numpy's `_reconstruct(ndarray, (0,), b"b")`; the state holds everything."""
    if not isinstance(value.state, tuple) or len(value.state) != 5:
        return value
    _version, shape, dtype, fortran, data = value.state
    return _array(values, value, shape, dtype, "F" if fortran else "C", data)


def _array_from_buffer(values: "PlainValues", value: Described) -> Any:
    """numpy's `_frombuffer(data, dtype, shape, order)`."""
    data, dtype, shape, order = value.arguments
    return _array(values, value, shape, dtype, "F" if order == "F" else "C", data)


def _scalar(values: "PlainValues", value: Described) -> Any:
    """numpy's `scalar(dtype, data)`."""
    dtype, data = value.arguments
    array = _array(values, value, (1,), dtype, "C", data)
    return value if array is value else array[0].item()


RECOVER: dict[str, Recovery] = {
    "argparse.Namespace": _namespace,
    "types.SimpleNamespace": _namespace,
    "builtins.dict": _dict,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _elements(list),
    "builtins.set": _elements(set),
    "builtins.frozenset": _elements(frozenset),
    "torch.Size": _elements(tuple),
    "builtins.complex": _numbers(complex),
    "builtins.range": _numbers(range),
    "builtins.slice": _numbers(slice),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,
    "torch.device": _device,
    "torch.torch_version.TorchVersion": _version,
    "pathlib.Path": _path,
    "pathlib.PosixPath": _path,
    "pathlib.PurePath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib.WindowsPath": _path,
    "numpy.core.multiarray._reconstruct": _array_from_state,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy.core.multiarray.scalar": _scalar,
}
