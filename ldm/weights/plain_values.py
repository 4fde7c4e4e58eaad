"""Values out of what a pickle describes, each made once: what was shared stays shared, and loops end.

Recovered are tensors, Python's own containers, bytes and numbers, OmegaConf's containers and nodes
(interpolations stay text), namespaces and AttributeDicts (dict), devices, paths and versions (text), numpy
arrays (read-only) and scalars of numbers, bools and text. Every other object becomes a `Placeholder`, every
other name a `GlobalName`.
"""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from ldm.weights.pickle_scan import BYTES_A_STEP, Budget
from ldm.weights.stand_ins import Described, GlobalName, Name, Placeholder, StoredStorage
from ldm.weights.tensors import DTYPES, REBUILD, Storage, storage_dtype

# (key, type of the elements, number of elements, (key of a view, its offset, its size) or None) -> memory
StorageLoader = Callable[[str, torch.dtype, int, Any], torch.UntypedStorage]
Recovery = Callable[["_Values", Described], Any]

_MAX_TEXT = 100
_MAX_DEPTH = 100
_HASHABLE = str | bytes | int | float | complex | frozenset | torch.Tensor | Placeholder
_SURROGATE = re.compile("[\ud800-\udfff]")
_DTYPE = re.compile(r"([biufc])(1|2|4|8|16)|([SU])(\d{1,5})|\?")


def recover(described: Any, budget: Budget, load_storage: StorageLoader) -> Any:
    """The values of what `ldm.weights.unpickle.describe` gives.

    Raises:
        CheckpointError: damaged, absurd or refused, as in `describe`.
    """
    values = _Values(budget, load_storage)
    with budget.blamed_on_the_file():
        value = values(described)
        while values.unfilled:  # no recursion: objects refer to one another without end
            placeholder, described = values.unfilled.pop()
            placeholder.arguments = tuple(map(values, described.arguments))
            placeholder.state = values(described.state)
            placeholder.items = values(described.items)
            placeholder.mapping = values(described.mapping)
        return value


def has_value(kind: GlobalName) -> bool:
    """Whether calls of this name are recovered."""
    return str(kind) in REBUILD or _recovery_of(kind) is not None


class _Values:
    """Called with a part of the description, gives its value."""

    def __init__(self, budget: Budget, load_storage: StorageLoader):
        self.budget = budget
        self.unfilled: list[tuple[Placeholder, Described]] = []
        self._load_storage = load_storage
        self._done: dict[int, tuple[Any, Any]] = {}
        self._depth = 0

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Name):
            return DTYPES.get(value.kind.name, value.kind) if value.kind.module == "torch" else value.kind
        if isinstance(value, str) and _SURROGATE.search(value):
            return self.encode(value, "utf-8")  # bytes of Python 2 that are no text, see `unpickle`
        if not isinstance(value, Described | dict | list | tuple | set | frozenset):
            return value
        if id(value) not in self._done:
            self.budget.require(self._depth < _MAX_DEPTH, f"containers more than {_MAX_DEPTH} deep")
            self._depth += 1
            recovered = self._object(value) if isinstance(value, Described) else self._container(value)
            self._depth -= 1
            self._becomes(value, recovered)
        return self._done[id(value)][1]

    def key(self, value: Any) -> Any:
        """The value of a dictionary's key or a set's element: only what is quickly hashed is recovered."""
        if isinstance(value, tuple):
            self.budget.spend(len(value))
            return tuple(map(self.key, value))
        plain = self(value)
        if isinstance(value, Described) and not isinstance(plain, _HASHABLE):
            return self._placeholder(value)
        return plain

    def fill(self, owner: Any, pairs: Iterable[tuple[Any, Any]]) -> dict:
        """A dict in the place of `owner`, which may be inside of it."""
        result = self._becomes(owner, {})
        for key, value in pairs:
            result[self.key(key)] = self(value)
        return result

    def encode(self, text: str, encoding: str) -> bytes:
        self.budget.spend(len(text) // BYTES_A_STEP)
        return text.encode(encoding, "surrogateescape")

    def _becomes(self, value: Any, result: Any) -> Any:
        self._done[id(value)] = value, result  # an id is good for as long as its object lives
        return result

    def _container(self, value: dict | list | tuple | set | frozenset) -> Any:
        if isinstance(value, dict):
            return self.fill(value, value.items())
        if isinstance(value, list):
            result = self._becomes(value, [])
            result.extend(map(self, value))
            return result
        if isinstance(value, tuple):
            self._becomes(value, GlobalName("builtins", "tuple"))  # what it sees if it contains itself
            return tuple(map(self, value))
        return type(value)(map(self.key, value))

    def _object(self, value: Described) -> Any:
        if isinstance(value, StoredStorage):
            key, count, view = value.arguments
            dtype = storage_dtype(value.kind, self.budget.where)
            return Storage(self._load_storage(key, dtype, count, view), dtype)
        self._becomes(value, value.kind)  # what it sees if it contains itself
        if str(value.kind) in REBUILD:
            return REBUILD[str(value.kind)](self.budget, *map(self, value.arguments))
        recovery = _recovery_of(value.kind)
        result = recovery(self, value) if recovery else value
        return self._placeholder(value) if result is value else result

    def _placeholder(self, value: Described) -> Placeholder:
        """A placeholder, to be filled when everything that is not inside of one is done."""
        placeholder = Placeholder(value.kind)
        self.unfilled.append((placeholder, value))
        return placeholder


# Functions of the table below give an object's value, or the object itself where it stays a placeholder.


def _omegaconf(values: _Values, value: Described) -> Any:
    state = value.state if isinstance(value.state, dict) else {}
    inside = [state[key] for key in ("_content", "_val") if key in state]
    return values(inside[0]) if inside else value


def _namespace(values: _Values, value: Described) -> dict | Described:
    if value.arguments:
        return value
    return values.fill(value, value.state.items() if isinstance(value.state, dict) else ())


def _dict(values: _Values, value: Described, skipped: int = 0) -> dict:
    (source,) = value.arguments[skipped:] or ((),)
    pairs = source.items() if isinstance(source, dict) else source
    values.budget.spend(len(source))
    return values.fill(value, [*pairs, *value.mapping.items()])


def _elements(kind: type) -> Recovery:
    def build(values: _Values, value: Described) -> Any:
        source = value.arguments[0] if value.arguments else ()
        values.budget.spend(len(source))
        each = values.key if kind in (set, frozenset) else values
        return kind(map(each, [*source, *value.items]))

    return build


def _bytes(values: _Values, value: Described) -> bytes | bytearray:
    """`bytes()`, `bytes(data)`, `bytearray(text, "latin-1")`, `codecs.encode(text, "latin1")`; no length."""
    data, encoding = (*value.arguments, "latin1")[:2] if value.arguments else (b"", "latin1")
    data = values(data)  # a bytearray of protocol 2 is made from such a call
    if isinstance(data, bytes | bytearray):
        return data
    of_text = isinstance(data, str) and encoding in ("latin1", "latin-1", "utf-8")
    values.budget.require(of_text, "bytes made from something else than text")
    return values.encode(data, encoding)


def _text(values: _Values, value: Described) -> str:
    """A version, or a device such as "cuda:0": where weights go is the caller's choice, not the file's."""
    text = ":".join(str(part) for part in value.arguments if isinstance(part, str | int))
    values.budget.require(0 < len(text) <= _MAX_TEXT, "a device or a version without a name")
    return text


def _path(values: _Values, value: Described) -> str:
    values.budget.spend(sum(map(len, value.arguments)))
    return str(PurePosixPath(*value.arguments))


def _dtype(value: Any) -> np.dtype | None:
    """A numpy type of numbers, bools or text; None for objects, records and the like."""
    code = value.arguments[0] if isinstance(value, Described) and value.arguments else None
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        return None
    order = value.state[1] if isinstance(value.state, tuple) and value.state[1:] else "="
    return np.dtype((order if order in ("<", ">") else "=") + code)


def _array(values: _Values, value: Described, dtype: Any, shape: Any, order: str, data: Any) -> Any:
    """An array of plain elements, or `value` where it is one of objects."""
    dtype, data = _dtype(dtype), values(data)
    if isinstance(data, str):  # of Python 2
        data = values.encode(data, "utf-8")
    if dtype is None or not isinstance(data, bytes | bytearray):
        return value
    return np.ndarray(shape, dtype, memoryview(data).toreadonly(), order=order)


def _array_from_state(values: _Values, value: Described) -> Any:
    """numpy's `_reconstruct(ndarray, (0,), b"b")`; the state holds everything."""
    _, shape, dtype, fortran, data = value.state
    return _array(values, value, dtype, shape, "F" if fortran else "C", data)


def _array_from_buffer(values: _Values, value: Described) -> Any:
    """numpy's `_frombuffer(data, dtype, shape, order)`."""
    data, dtype, shape, order = value.arguments
    return _array(values, value, dtype, shape, order, data)


def _scalar(values: _Values, value: Described) -> Any:
    """numpy's `scalar(dtype, data)`."""
    dtype, data = value.arguments
    array = _array(values, value, dtype, (1,), "C", data)
    return value if array is value else array[0].item()


_RECOVER: dict[str, Recovery] = {
    r"omegaconf\.(\w+\.)*(DictConfig|ListConfig|\w+Node)": _omegaconf,
    r"argparse\.Namespace|types\.SimpleNamespace": _namespace,
    r"(\w+\.)*(AttributeDict|EasyDict)|builtins\.dict|collections\.(OrderedDict|Counter)": _dict,
    # What it would make for missing keys is dropped.
    r"collections\.defaultdict": functools.partial(_dict, skipped=1),
    r"collections\.deque": _elements(list),
    r"builtins\.set": _elements(set),
    r"builtins\.frozenset": _elements(frozenset),
    r"torch\.Size": _elements(tuple),
    r"builtins\.complex": lambda _, value: complex(*value.arguments),
    r"builtins\.range": lambda _, value: range(*value.arguments),
    r"builtins\.bytes|builtins\.bytearray|_codecs\.encode": _bytes,
    r"torch\.device|torch\.torch_version\.TorchVersion": _text,
    r"pathlib\.(Path|PosixPath|PurePath|PurePosixPath|WindowsPath)": _path,
    r"numpy\.core\.multiarray\._reconstruct": _array_from_state,
    r"numpy\.core\.numeric\._frombuffer": _array_from_buffer,
    r"numpy\.core\.multiarray\.scalar": _scalar,
}


@functools.lru_cache(maxsize=1000)
def _recovery_of(kind: GlobalName) -> Recovery | None:
    return next((made for pattern, made in _RECOVER.items() if re.fullmatch(pattern, str(kind))), None)
