"""Tensors from what a file says about them, after everything it says has been checked.

A pickle describes a tensor as a call of a function of `torch._utils`; those functions are written anew here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.weights.errors import UnsupportedCheckpoint, require
from ldm.weights.pickle_scan import Budget
from ldm.weights.stand_ins import GlobalName, name_of

_INT64 = 2**63
_MAX_DIMENSIONS = 64
# A view may repeat its storage (stride 0) up to this many bytes; more is a way to fill the memory later.
_MAX_EXPANDED = 64 * 2**20
_BOOLS_A_STEP = 4096  # every value of a bool tensor is looked at

_DTYPES = """
    float64 float32 float16 bfloat16 complex32 complex64 complex128 bool uint8 int8 int16 int32 int64
    uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu
"""
DTYPES: dict[str, torch.dtype] = {name: vars(torch)[name] for name in _DTYPES.split() if name in vars(torch)}
_STORAGES = """
    Double=float64 Float=float32 Half=float16 BFloat16=bfloat16 Long=int64 Int=int32 Short=int16 Char=int8
    Byte=uint8 Bool=bool ComplexDouble=complex128 ComplexFloat=complex64 Untyped=uint8 _Untyped=uint8
"""
_STORAGE_DTYPES = {
    f"{kind}Storage": DTYPES[dtype] for kind, dtype in (word.split("=") for word in _STORAGES.split())
}


class Storage(NamedTuple):
    """The memory of tensors, and the type of elements that its file gives it."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


def storage_dtype(kind: GlobalName, where: str) -> torch.dtype:
    """The type of the elements of a storage whose class in torch is `kind`."""
    known = kind.module.partition(".")[0] == "torch" and kind.name in _STORAGE_DTYPES
    require(known, where, f"holds a storage of unknown type {kind}", UnsupportedCheckpoint)
    return _STORAGE_DTYPES[kind.name]


def check_bools(tensor: Tensor, where: str) -> None:
    """A bool that is neither 0 nor 1 is undefined behaviour in whatever indexes with it."""
    if tensor.dtype is torch.bool and not tensor.is_meta:
        proper = (tensor.view(torch.uint8) <= 1).all()
        require(proper, where, "a bool tensor holds other values than 0 and 1")


def _tensor(budget: Budget, storage, offset, shape, stride, _requires_grad=False, hooks=None, metadata=None):
    """`_rebuild_tensor` and its second version."""
    dtype = getattr(storage, "dtype", None)
    return _tensor_v3(budget, storage, offset, shape, stride, False, hooks, dtype, metadata)


def _tensor_v3(budget: Budget, storage, offset, shape, stride, _requires_grad, hooks, dtype, metadata=None):
    """`_rebuild_tensor_v3`: tensors of one storage share its memory, as they did when they were saved."""
    _no_hooks(budget, hooks)
    known = isinstance(storage, Storage) and isinstance(dtype, torch.dtype)
    budget.require(known, "a tensor without a storage or a type")
    flags = {} if metadata is None else metadata
    budget.require(not set(flags) - {"conj", "neg"}, "a tensor with unknown metadata")
    tensor = _view(budget, storage.untyped, dtype, offset, shape, stride)
    if dtype is torch.bool:
        budget.spend(tensor.numel() // _BOOLS_A_STEP)
        check_bools(tensor, budget.where)
    if flags.get("conj"):
        tensor = tensor.conj()
    return torch._neg_view(tensor) if flags.get("neg") else tensor


def _view(budget: Budget, storage: torch.UntypedStorage, dtype, offset, shape, stride) -> Tensor:
    """A view of `storage`; offset and stride count elements. torch itself would enlarge the storage."""
    possible = all(map(_are_indices, (shape, stride, (offset,)))) and len(shape) == len(stride)
    budget.require(
        possible and math.prod(shape) < _INT64, "a tensor with an impossible shape, stride or offset"
    )
    count = math.prod(shape)
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 if count else 0
    held = storage.nbytes() // dtype.itemsize
    budget.require(offset + reach <= held, f"a tensor of {offset + reach} elements in a storage of {held}")
    nbytes = count * dtype.itemsize
    budget.require(
        count <= held or nbytes <= _MAX_EXPANDED, f"a tensor that repeats {held} elements into {nbytes} bytes"
    )
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)


def _are_indices(values: object) -> bool:
    of_some_axes = isinstance(values, tuple) and len(values) <= _MAX_DIMENSIONS
    return of_some_axes and all(type(value) is int and 0 <= value < _INT64 for value in values)


def _no_hooks(budget: Budget, hooks: Any) -> None:
    """Backward hooks are functions that run in training; honest weights have an empty dict there."""
    if hooks:
        inside = list(hooks.values()) if isinstance(hooks, dict) else [hooks]
        raise budget.refusal(name_of(inside[0]), "attaches to a tensor the backward hook")


def _parameter(budget: Budget, data, _requires_grad=True, hooks=None, _state=None) -> Tensor:
    """`_rebuild_parameter` with or without a state: the tensor, without Python attributes."""
    budget.require(isinstance(data, Tensor), "a parameter without data")
    _no_hooks(budget, hooks)
    return data


def _tensor_subclass(budget: Budget, function, _kind, arguments, _state) -> Tensor:
    """`_rebuild_from_type_v2`: the plain tensor inside."""
    builder = REBUILD.get(str(function)) if isinstance(function, GlobalName) else None
    if builder not in (_tensor, _tensor_v3, _parameter):
        raise budget.refusal(name_of(function), "builds a tensor through")
    return builder(budget, *arguments)


# Called with the arguments of the original function; a wrong number of them is a TypeError.
REBUILD: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_subclass,
}
