"""Tensors and texts into .safetensors files that are either whole or not there.

The format: eight bytes of header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors). The library is not used for writing because it puts metadata in
another order every time.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.files import whole_file
from ldm.weights.tensors import DTYPES

MAX_HEADER = 100_000_000  # bytes, the format's own limit
_METADATA = "__metadata__"
_CODES = """
    F64=float64 F32=float32 F16=float16 BF16=bfloat16 I64=int64 I32=int32 I16=int16 I8=int8
    U64=uint64 U32=uint32 U16=uint16 U8=uint8 BOOL=bool C64=complex64 F8_E4M3=float8_e4m3fn
    F8_E5M2=float8_e5m2 F8_E4M3FNUZ=float8_e4m3fnuz F8_E5M2FNUZ=float8_e5m2fnuz F8_E8M0=float8_e8m0fnu
"""
_CODE_OF = {
    DTYPES[name]: code for code, _, name in (word.partition("=") for word in _CODES.split()) if name in DTYPES
}


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata (texts) as a .safetensors file, atomically.

    The same content gives the same bytes: types with wide elements come first, so that every tensor is
    aligned, then by name; metadata is sorted. Tensors that share memory are written one by one, each in full;
    at most one tensor is copied at a time.

    Raises:
        ValueError: metadata that is not text, or a tensor that the format cannot hold.
    """
    if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
        raise ValueError("metadata of a safetensors file must be text; use json.dumps for anything else")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == _METADATA:
            raise ValueError(f"a tensor cannot be called {name!r}")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _CODE_OF:
            raise ValueError(
                f"the tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be written; "
                f"allowed are dense tensors with data of {', '.join(str(dtype) for dtype in _CODE_OF)}"
            )
    ordered = sorted(tensors.items(), key=_place)
    header = _header(ordered, metadata)
    with whole_file(path, durable=True) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))


def _place(pair: tuple[str, Tensor]) -> tuple[int, str, str]:
    return -pair[1].dtype.itemsize, _CODE_OF[pair[1].dtype], pair[0]


def _header(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """The JSON text, padded with spaces to a multiple of eight bytes."""
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, tensor in ordered:
        offsets = [position, position + tensor.numel() * tensor.dtype.itemsize]
        header[name] = {"dtype": _CODE_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would have {len(text)} bytes; the format allows {MAX_HEADER}")
    return text
