"""What a user asks for, turned into tensors for the network."""

from ldm.conditioning.class_labels import ClassEmbedder, ClassLabel
from ldm.conditioning.conditioner import Conditioner, Embedder
from ldm.conditioning.image import ImageEmbedder

__all__ = ["ClassEmbedder", "ClassLabel", "Conditioner", "Embedder", "ImageEmbedder"]
