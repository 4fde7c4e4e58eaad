"""Every way of reading and writing weights."""

from ldm.checkpoints.errors import CheckpointError
from ldm.checkpoints.load import load

__all__ = ["CheckpointError", "load"]
