"""Files of weights: bytes into tensors and back, and nothing in a file is executed."""

from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from ldm.weights.reading import INDEX, Weights, read_pickled, read_weights
from ldm.weights.stand_ins import GlobalName, Placeholder
from ldm.weights.writing import write_safetensors

__all__ = [
    "INDEX",
    "CheckpointError",
    "CorruptCheckpoint",
    "GlobalName",
    "Placeholder",
    "UnsafeCheckpoint",
    "UnsupportedCheckpoint",
    "Weights",
    "read_pickled",
    "read_weights",
    "write_safetensors",
]
