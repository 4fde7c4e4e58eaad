"""Tensors and texts into files that are either whole or not there."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.files import whole_file
from ldm.weights.safetensors_files import write_stream


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata (texts) as a .safetensors file, atomically.

    The same content gives the same bytes. Tensors that share memory are written one by one, each in full; at
    most one tensor is copied at a time.

    Raises:
        ValueError: metadata that is not text, or a tensor that the format cannot hold.
    """
    with whole_file(path, durable=True) as file:
        write_stream(file, tensors, metadata)
