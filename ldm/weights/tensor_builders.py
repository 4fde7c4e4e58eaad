"""Tensors from what a file says about them, after everything it says has been checked."""

import torch
from torch import Tensor

from ldm.weights.errors import CorruptCheckpoint

_INT64 = 2**63
_MAX_DIMENSIONS = 64
# A view may repeat its storage (stride 0) up to this many bytes; more is a way to fill the memory later.
_MAX_EXPANDED = 64 * 2**20

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex32", "complex64", "complex128", "bool"),
        *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
}


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < _INT64


def element_count(shape: tuple, where: str) -> int:
    """Product of the sizes, which must be non-negative integers with a product below 2^63."""
    if len(shape) > _MAX_DIMENSIONS or not all(_is_index(size) for size in shape):
        raise CorruptCheckpoint(where, f"a tensor has the impossible shape {_short(shape)}")
    count = 1
    for size in shape:
        count *= size
    if count >= _INT64:
        raise CorruptCheckpoint(where, f"a tensor has the impossible shape {_short(shape)}")
    return count


def build_tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple, stride: tuple, where: str
) -> Tensor:
    """A view of `storage`; tensors of one storage share its memory, as they did when they were saved.

    Args:
        offset, stride: in elements of `dtype`.

    Raises:
        CorruptCheckpoint: shape, stride or offset are impossible, or reach outside of the storage.
    """
    count = element_count(shape, where)
    if len(stride) != len(shape) or not all(_is_index(step) for step in stride) or not _is_index(offset):
        raise CorruptCheckpoint(
            where,
            f"a tensor of shape {_short(shape)} has stride {_short(stride)} and offset {_short((offset,))}",
        )
    last = (
        offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if count
        else offset - 1
    )
    held = storage.nbytes() // dtype.itemsize
    if last >= held:
        raise CorruptCheckpoint(
            where,
            f"a tensor of shape {_short(shape)}, stride {_short(stride)} and offset {offset} needs "
            f"{last + 1} elements of a storage that has {held}",
        )
    if count > held and count * dtype.itemsize > _MAX_EXPANDED:
        raise CorruptCheckpoint(
            where,
            f"a tensor of shape {_short(shape)} repeats a storage of {held} elements into "
            f"{count * dtype.itemsize / 2**30:.1f} GiB",
        )
    tensor = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)
    # A bool that is neither 0 nor 1 is undefined behaviour in whatever indexes with it.
    if dtype is torch.bool and not tensor.is_meta and bool((tensor.view(torch.uint8) > 1).any()):
        raise CorruptCheckpoint(
            where, f"a bool tensor of shape {_short(shape)} holds other values than 0 and 1"
        )
    return tensor


def _short(values: tuple) -> str:
    """Numbers from a file, at a length fit for a message (Python refuses to print very long ones)."""
    shown = [
        (str(value) if abs(value) < _INT64 else f"2**{value.bit_length()}")
        if type(value) is int
        else type(value).__name__
        for value in values[:8]
    ]
    return f"({', '.join(shown)}{', ...' if len(values) > 8 else ''})"
