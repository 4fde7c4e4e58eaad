"""Images in: folders, embedded sets, their deterministic order, and cached latents."""

from ldm.data.dataset import ImageDataset
from ldm.data.decode import BadImageError
from ldm.data.embedded import ArrayDataset, Digits, Emoji, MissingPackageError
from ldm.data.folder import ImageFolder
from ldm.data.latents import LatentCache, LatentDataset
from ldm.data.loader import collate, make_loader
from ldm.data.sampler import PositionSampler, SequentialBatches
from ldm.data.statistics import ChannelStatistics, measure_latents
from ldm.data.verify import BadFile, verify

__all__ = [
    "ArrayDataset",
    "BadFile",
    "BadImageError",
    "ChannelStatistics",
    "Digits",
    "Emoji",
    "ImageDataset",
    "ImageFolder",
    "LatentCache",
    "LatentDataset",
    "MissingPackageError",
    "PositionSampler",
    "SequentialBatches",
    "collate",
    "make_loader",
    "measure_latents",
    "verify",
]
