"""Reading .safetensors files with the library of that name: tensors are pages of the file."""

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.mapped import MappedFile
from ldm.weights.tensors import check_bools

MAX_HEADER = 100_000_000  # the format's own limit


def read_safetensors(file: MappedFile, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata.

    Raises:
        CorruptCheckpoint: the file is truncated, the header is no JSON or absurdly long, tensors overlap,
            leave gaps, or have another size than their shape and type say.
        UnsupportedCheckpoint: a type of elements that torch or the library does not know.
    """
    try:
        with safe_open(file.where, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if "unknown variant" in str(error):
            raise UnsupportedCheckpoint(file.where, f"has an unknown type of elements: {error}") from error
        raise CorruptCheckpoint(
            file.where, f"is truncated or damaged ({file.size} bytes): {str(error)[:200]}"
        ) from error
    for name, tensor in tensors.items():
        tensors[name] = _aligned(tensor).to(device)
        check_bools(tensors[name], file.where)
    return tensors, metadata


def _aligned(tensor: Tensor) -> Tensor:
    """Misaligned elements are slow at best."""
    return tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor
