"""Every way of reading and writing weights."""

from ldm.checkpoints.load import load
from ldm.weights.errors import CheckpointError

__all__ = ["CheckpointError", "load"]
