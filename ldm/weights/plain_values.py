"""Placeholders of well-known data classes turned back into plain values: dicts, lists, text, numbers, arrays.

Recovered: OmegaConf's containers and nodes (interpolations stay text), `argparse.Namespace` and its like
(dict), Lightning's AttributeDict (dict), paths and versions (text), numpy arrays and scalars of numbers,
bools and text (arrays are read-only). Everything else stays a `Placeholder`.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ldm.weights.errors import CorruptCheckpoint
from ldm.weights.placeholders import GlobalName, Placeholder

_MAX_DEPTH = 100
_MAX_PATH = 4096
_OMEGACONF = re.compile(r"omegaconf\.(\w+\.)*(DictConfig|ListConfig|\w+Node)")
_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
_MAPPINGS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|easydict)\.(\w+\.)*(AttributeDict|EasyDict)"
)
_DTYPE = re.compile(r"([biufc])(1|2|4|8|16)|([SU])(\d{1,5})|\?")


class Plain:
    """Recovers plain values in a whole tree, each once, so that shared ones stay shared and loops end."""

    def __init__(self, where: str):
        self.where = where
        self._done: dict[int, Any] = {}
        self._keep: list[Any] = []  # an id is only good for as long as its object lives

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """`value` with every recoverable placeholder in its containers replaced; containers are copied."""
        if not isinstance(value, dict | list | tuple | Placeholder):
            return value
        if depth > _MAX_DEPTH:
            raise CorruptCheckpoint(
                self.where, f"the pickle inside nests containers more than {_MAX_DEPTH} deep"
            )
        if id(value) in self._done:
            return self._done[id(value)]
        self._keep.append(value)
        self._done[id(value)] = value  # what a tuple or a placeholder that contains itself sees
        if isinstance(value, dict):
            result = self._done[id(value)] = {}
            result.update((self._key(key), self(item, depth + 1)) for key, item in value.items())
        elif isinstance(value, list):
            result = self._done[id(value)] = []
            result.extend(self(item, depth + 1) for item in value)
        elif isinstance(value, tuple):
            result = self._done[id(value)] = tuple(self(item, depth + 1) for item in value)
        else:
            result = self._done[id(value)] = self._placeholder(value, depth)
        return result

    def _key(self, key: Any) -> Any:
        """A dictionary's key: recovered only into something that can still be one."""
        plain = self(key) if isinstance(key, Placeholder) else key
        return plain if isinstance(plain, str | bytes | int | float | complex) else key

    def _placeholder(self, value: Placeholder, depth: int) -> Any:
        name = str(value.kind)
        state = value.state if isinstance(value.state, dict) else {}
        if name in _NAMESPACES and not value.arguments:
            return self(state, depth + 1)
        if _MAPPINGS.fullmatch(name):
            return self(value.mapping, depth + 1)
        if _OMEGACONF.fullmatch(name) and ("_content" in state or "_val" in state):
            return self(state["_content"] if "_content" in state else state["_val"], depth + 1)
        recover = _RECOVER.get(name)
        result = recover(value) if recover else None
        return value if result is None else result


def _path(value: Placeholder) -> str | None:
    if not value.arguments or not all(isinstance(part, str) for part in value.arguments):
        return None
    if sum(map(len, value.arguments)) > _MAX_PATH:
        return None
    first, *rest = value.arguments
    return first.rstrip("/") + "".join(f"/{part}" for part in rest) if rest else first


def _version(value: Placeholder) -> str | None:
    return value.arguments[0] if value.arguments and isinstance(value.arguments[0], str) else None


def _dtype(value: Any) -> np.dtype | None:
    """A numpy type of numbers, bools or text from its placeholder; None for objects, records and the like."""
    if (
        not isinstance(value, Placeholder)
        or value.kind != GlobalName("numpy", "dtype")
        or not value.arguments
    ):
        return None
    code = value.arguments[0]
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        return None
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "="
    try:
        return np.dtype((order if order in ("<", ">", "=", "|") else "=") + code)
    except TypeError:  # "f1", say
        return None


def _array(value: Placeholder) -> np.ndarray | None:
    if not isinstance(value.state, tuple) or len(value.state) != 5:
        return None
    _version, shape, dtype, fortran, data = value.state
    dtype = _dtype(dtype)
    if dtype is None or not isinstance(data, bytes) or not isinstance(shape, tuple) or len(shape) > 32:
        return None
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        return None
    count = 1
    for size in shape:
        count *= size
    if count * dtype.itemsize != len(data) or not data:
        return np.zeros(shape, dtype) if not data and count == 0 and max(shape) < 2**31 else None
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _scalar(value: Placeholder) -> Any:
    if len(value.arguments) != 2 or not isinstance(value.arguments[1], bytes):
        return None
    dtype = _dtype(value.arguments[0])
    if dtype is None or dtype.itemsize != len(value.arguments[1]) or not value.arguments[1]:
        return None
    return np.frombuffer(value.arguments[1], dtype)[0].item()


_RECOVER: dict[str, Callable[[Placeholder], Any]] = {
    **{
        f"pathlib.{kind}": _path for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")
    },
    "torch.torch_version.TorchVersion": _version,
    "numpy.ndarray": _array,
    "numpy.scalar": _scalar,
}
