"""The calls that a pickle may make: functions of this project that build tensors or plain containers.

Every builder takes the reader (which counts work and knows the file's name) and the arguments as the file
gives them, and checks them: they are whatever the file's author wanted them to be.
"""

from collections.abc import Callable
from itertools import chain, islice
from typing import Any, Protocol

import torch

from ldm.weights.errors import CorruptCheckpoint, UnsafeCheckpoint
from ldm.weights.placeholders import GlobalName, Placeholder, StoredStorage, name_of
from ldm.weights.tensor_builders import build_tensor


class Reader(Protocol):
    """What a builder needs of the unpickler."""

    where: str

    def spend(self, work: int) -> None:
        """Count elements that are about to be copied; raises when the file asks for absurdly many."""

    def spend_bytes(self, count: int) -> None: ...

    def construct(self, kind: Any, arguments: tuple) -> Any:
        """An object made without calling its `__init__`."""


Builder = Callable[[Reader, tuple], Any]
_MAX_KEY_PARTS = 1000


def _fail(reader: Reader, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(reader.where, f"the pickle inside is damaged: {what}")


def _tensor(reader: Reader, arguments: tuple) -> torch.Tensor:
    """`_rebuild_tensor(storage, offset, shape, stride)` and, with more arguments, its second version."""
    storage, offset, shape, stride, _requires_grad, hooks, metadata = (*arguments, *(None,) * 7)[:7]
    if len(arguments) > 7 or not isinstance(storage, StoredStorage):
        raise _fail(reader, "a tensor without a storage")
    return _view(reader, storage.untyped, storage.dtype, offset, shape, stride, hooks, metadata)


def _tensor_v3(reader: Reader, arguments: tuple) -> torch.Tensor:
    """`_rebuild_tensor_v3(storage, offset, shape, stride, requires_grad, hooks, dtype, metadata)`."""
    storage, offset, shape, stride, _requires_grad, hooks, dtype, metadata = (*arguments, *(None,) * 8)[:8]
    if len(arguments) > 8 or not isinstance(storage, StoredStorage) or not isinstance(dtype, torch.dtype):
        raise _fail(reader, "a tensor without a storage or a type")
    return _view(reader, storage.untyped, dtype, offset, shape, stride, hooks, metadata)


def _view(reader: Reader, storage, dtype, offset, shape, stride, hooks, metadata) -> torch.Tensor:
    _no_hooks(reader, hooks)
    if not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise _fail(reader, "a tensor whose shape or stride is no tuple")
    reader.spend(20)  # a tensor weighs about as much as twenty small objects
    tensor = build_tensor(storage, dtype, offset, shape, stride, reader.where)
    if dtype is torch.bool:
        reader.spend(tensor.numel() // 4096)  # every value was looked at
    flags = metadata if isinstance(metadata, dict) else {}
    if set(flags) - {"conj", "neg"} or (metadata is not None and not isinstance(metadata, dict)):
        raise _fail(reader, "a tensor with unknown metadata")
    if flags.get("conj"):
        tensor = tensor.conj()
    return torch._neg_view(tensor) if flags.get("neg") else tensor


def _no_hooks(reader: Reader, hooks: Any) -> None:
    """Backward hooks are functions that run in training; honest weights have an empty dict there."""
    if not hooks:
        return
    inside = (
        hooks.values() if isinstance(hooks, dict) else hooks if isinstance(hooks, tuple | list) else [hooks]
    )
    names = [name_of(value) for value in inside if isinstance(value, GlobalName | Placeholder)]
    raise UnsafeCheckpoint(reader.where, (names or ["unnamed"])[0], "attaches to a tensor the backward hook")


def _parameter(reader: Reader, arguments: tuple) -> torch.Tensor:
    """`_rebuild_parameter(data, requires_grad, hooks[, state])`: the tensor, without Python attributes."""
    data, _requires_grad, hooks = (*arguments, None, None)[:3]
    if len(arguments) > 4 or not isinstance(data, torch.Tensor):
        raise _fail(reader, "a parameter without data")
    _no_hooks(reader, hooks)
    return data


def _tensor_subclass(reader: Reader, arguments: tuple) -> Any:
    """`_rebuild_from_type_v2(function, class, arguments, state)`: the plain tensor inside."""
    if len(arguments) != 4 or not isinstance(arguments[2], tuple):
        raise _fail(reader, "a tensor subclass without data")
    function, inner = arguments[0], arguments[2]
    builder = BUILDERS.get(str(function)) if isinstance(function, GlobalName) else None
    if builder not in (_tensor, _tensor_v3, _parameter):
        raise UnsafeCheckpoint(reader.where, name_of(function), "builds a tensor through")
    return builder(reader, inner)


def _elements(reader: Reader, arguments: tuple) -> list | tuple:
    """The one optional list or tuple that a container is made from."""
    (values,) = arguments or ((),)
    if not isinstance(values, list | tuple | set | frozenset | dict):
        raise _fail(reader, f"a container made from {type(values).__name__}")
    reader.spend(len(values))
    return list(values)


def _dict(reader: Reader, arguments: tuple) -> dict:
    if arguments and isinstance(arguments[0], dict):
        pairs = list(arguments[0].items())
    else:
        pairs = _elements(reader, arguments[:1])
    if len(arguments) > 1 or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise _fail(reader, "a dict made from something else than pairs")
    reader.spend(len(pairs))
    return {checked_key(reader, key): value for key, value in pairs}


def _defaultdict(reader: Reader, arguments: tuple) -> dict:
    return _dict(reader, arguments[1:])  # what it would make for missing keys is dropped


def _set(reader: Reader, arguments: tuple) -> set:
    return {checked_key(reader, value) for value in _elements(reader, arguments)}


def _deque(reader: Reader, arguments: tuple) -> list:
    return _elements(reader, arguments[:1])


def _bytes(reader: Reader, arguments: tuple) -> bytes:
    """`bytes()`, `bytes(data)`, `bytearray(text, "latin-1")`, `codecs.encode(text, "latin1")`; no length."""
    value, encoding = (*arguments, "latin1")[:2] if arguments else (b"", "latin1")
    if (
        len(arguments) > 2
        or not isinstance(value, bytes | str)
        or encoding not in ("latin1", "latin-1", "utf-8")
    ):
        raise _fail(reader, "bytes made from something else than text")
    reader.spend_bytes(len(value))
    return value.encode(encoding) if isinstance(value, str) else bytes(value)


def _numbers(kind: type, most: int) -> Builder:
    def build(reader: Reader, arguments: tuple) -> Any:
        if not 0 < len(arguments) <= most or not all(
            type(x) in (int, float, bool, type(None)) for x in arguments
        ):
            raise _fail(reader, f"a {kind.__name__} made from something else than numbers")
        return kind(*arguments)

    return build


def _size(reader: Reader, arguments: tuple) -> tuple:
    return tuple(_elements(reader, arguments))


def _device(reader: Reader, arguments: tuple) -> str:
    """A device as text, such as "cuda:0"; where the weights go is the caller's choice, not the file's."""
    if not 1 <= len(arguments) <= 2 or not all(isinstance(part, str | int) for part in arguments):
        raise _fail(reader, "a device without a name")
    if any(len(part) > 100 for part in arguments if isinstance(part, str)):
        raise _fail(reader, "a device with an endless name")
    return ":".join(str(part) for part in arguments)


def _type_of_singleton(reader: Reader, arguments: tuple) -> GlobalName:
    """`type(None)` is how NoneType is stored; `type` with more arguments would make a class."""
    if arguments == (None,):
        return GlobalName("builtins", "NoneType")
    raise UnsafeCheckpoint(reader.where, "builtins.type", "calls")


def _new_object(reader: Reader, arguments: tuple) -> Any:
    if not arguments:
        raise _fail(reader, "an object without a class")
    return reader.construct(arguments[0], arguments[1:])


def _reconstructor(reader: Reader, arguments: tuple) -> Any:
    """`copyreg._reconstructor(class, base, state)`, the older form of NEWOBJ."""
    if len(arguments) != 3:
        raise _fail(reader, "an object without a class")
    kind, base, value = arguments
    if not isinstance(base, GlobalName) or base.module != "builtins":
        raise UnsafeCheckpoint(reader.where, name_of(base), "initialises an object through")
    return reader.construct(kind, () if value is None else (value,))


def _array(reader: Reader, arguments: tuple) -> Placeholder:
    """numpy's `_reconstruct(ndarray, (0,), b"b")`; its state holds the values (see `plain_values`)."""
    return Placeholder(GlobalName("numpy", "ndarray"))


def _array_from_buffer(reader: Reader, arguments: tuple) -> Placeholder:
    """numpy's `_frombuffer(data, dtype, shape, order)`."""
    if len(arguments) != 4:
        raise _fail(reader, "an array without data")
    data, dtype, shape, order = arguments
    return Placeholder(GlobalName("numpy", "ndarray"), state=(1, shape, dtype, order == "F", data))


def _scalar(reader: Reader, arguments: tuple) -> Placeholder:
    """numpy's `scalar(dtype, data)`."""
    return Placeholder(GlobalName("numpy", "scalar"), arguments)


BUILDERS: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_subclass,
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy.core.multiarray.scalar": _scalar,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _deque,
    "builtins.set": _set,
    "builtins.frozenset": lambda reader, arguments: frozenset(_set(reader, arguments)),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,
    "builtins.complex": _numbers(complex, 2),
    "builtins.range": _numbers(range, 3),
    "builtins.slice": _numbers(slice, 3),
    "builtins.type": _type_of_singleton,
    "copyreg.__newobj__": _new_object,
    "copyreg._reconstructor": _reconstructor,
}


def checked_key(reader: Reader, key: Any) -> Any:
    """A key (or set element) that is safe to hash: hashing a tuple nested a million deep kills Python."""
    if isinstance(key, tuple):
        level = [key]
        for _ in range(4):
            inner = chain.from_iterable(part for part in level if isinstance(part, tuple))
            level = list(islice(inner, _MAX_KEY_PARTS + 1))
            reader.spend(len(level))
            if len(level) > _MAX_KEY_PARTS:
                raise _fail(reader, "a dictionary key that is a huge tuple")
        if level:
            raise _fail(reader, "a dictionary key that is a deep nest of tuples")
    elif isinstance(key, list | dict | set):
        raise _fail(reader, f"a dictionary key that is a {type(key).__name__}")
    return key
