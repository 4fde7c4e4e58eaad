"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes.

Follows the format's description at https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.mapped import MappedFile
from ldm.weights.tensor_builders import DTYPES, build_tensor, element_count

MAX_HEADER = 100_000_000  # the format's own limit
_METADATA = "__metadata__"
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_FROM_NAME = {code: DTYPES[name] for code, name in _NAMES.items() if name in DTYPES}
_TO_NAME = {dtype: code for code, dtype in _FROM_NAME.items()}


def read_safetensors(file: MappedFile, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, as views of the mapped file (moved to `device`), and the file's metadata.

    Raises:
        CorruptCheckpoint: the file is truncated, the header is no JSON or absurdly long, tensors overlap,
            leave gaps, or have another size than their shape and type say.
        UnsupportedCheckpoint: a type of elements that torch or this reader does not know.
    """
    header, start = _header(file)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpoint(file.where, "the header's metadata is no table of texts")
    entries = {name: _entry(file, name, entry) for name, entry in header.items()}
    _check_layout(file, entries, start)
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if device.type == "meta":
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        else:
            storage = file.storage(start + begin, end - begin)
            tensors[name] = build_tensor(storage, dtype, 0, shape, _strides(shape), file.where).to(device)
    return tensors, metadata


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The JSON header and the position of the first tensor."""
    if file.size < 8:
        raise CorruptCheckpoint(
            file.where, f"the file has {file.size} bytes, too few for a safetensors header"
        )
    length = struct.unpack("<Q", file.view[:8])[0]
    if length > MAX_HEADER:
        raise CorruptCheckpoint(
            file.where,
            f"the header claims {length} bytes; the format allows {MAX_HEADER}. Is this a safetensors file?",
        )
    if 8 + length > file.size:
        raise CorruptCheckpoint(
            file.where,
            f"the header claims {length} bytes, but the file ends at byte {file.size}: it is truncated",
        )
    try:
        header = json.loads(bytes(file.view[8 : 8 + length]).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(
            file.where, f"the safetensors header is damaged: {str(error)[:120]}"
        ) from error
    if not isinstance(header, dict):
        raise CorruptCheckpoint(file.where, "the safetensors header is no table")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _entry(file: MappedFile, name: str, entry: Any) -> tuple[torch.dtype, tuple, int, int]:
    """Type, shape, first byte and end of one tensor, held against one another."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise CorruptCheckpoint(file.where, f"the header says too little about the tensor {name!r}")
    dtype, shape, offsets = (entry[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _FROM_NAME:
        raise UnsupportedCheckpoint(
            file.where, f"the tensor {name!r} has the type {dtype!r}; known are {', '.join(_FROM_NAME)}"
        )
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise CorruptCheckpoint(file.where, f"the header's entry of the tensor {name!r} is damaged")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise CorruptCheckpoint(file.where, f"the tensor {name!r} lies at impossible bytes")
    needed = element_count(tuple(shape), file.where) * _FROM_NAME[dtype].itemsize
    if end - begin != needed:
        raise CorruptCheckpoint(
            file.where,
            f"the tensor {name!r} of shape {shape} and type {dtype} needs {needed} bytes, not {end - begin}",
        )
    return _FROM_NAME[dtype], tuple(shape), begin, end


def _check_layout(file: MappedFile, entries: Mapping[str, tuple], start: int) -> None:
    """Tensors follow one another without gap or overlap and end where the file does."""
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            what = "overlaps another" if begin < position else "leaves a gap before it"
            raise CorruptCheckpoint(file.where, f"the tensor {name!r} {what}")
        position = end
    if start + position != file.size:
        what = "it is truncated" if start + position > file.size else "there is something behind the tensors"
        raise CorruptCheckpoint(
            file.where, f"the tensors need {start + position} bytes, but the file has {file.size}: {what}"
        )


def _strides(shape: tuple) -> tuple:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def write_stream(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor after another, the same bytes for the same content.

    Tensors that share memory are written each with all of its own. Types with wide elements come first, then
    by name, so that every tensor is aligned; metadata is sorted.

    Raises:
        ValueError: a name or a value that the format cannot hold.
    """
    if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
        raise ValueError("metadata of a safetensors file must be text; use json.dumps for anything else")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == _METADATA:
            raise ValueError(f"a tensor cannot be called {name!r}")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _TO_NAME:
            raise ValueError(
                f"the tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be written; "
                f"allowed are dense tensors with data of {', '.join(str(dtype) for dtype in _TO_NAME)}"
            )
    ordered = sorted(
        tensors, key=lambda name: (-tensors[name].dtype.itemsize, _TO_NAME[tensors[name].dtype], name)
    )
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in ordered:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _TO_NAME[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would have {len(text)} bytes; the format allows {MAX_HEADER}")
    file.write(struct.pack("<Q", len(text)) + text)
    for name in ordered:
        for piece in _pieces(tensors[name]):
            file.write(piece)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel():
        yield memoryview(flat.view(torch.uint8).numpy())
