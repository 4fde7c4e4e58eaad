"""Images in: folders, embedded sets, their deterministic order, and cached latents."""

from ldm.data.images.bad_files import BadFile, verify
from ldm.data.images.dataset import ImageDataset
from ldm.data.images.embedded import ArrayDataset, Digits, Emoji, MissingPackageError
from ldm.data.images.image_folder import ImageFolder
from ldm.data.images.pixels import BadImageError
from ldm.data.images.wrapped import Wrapped
from ldm.data.latents.cache import LatentCache, LatentDataset
from ldm.data.latents.statistics import ChannelStatistics, measure_latents
from ldm.data.loading.loader import collate, make_loader
from ldm.data.loading.order import PositionSampler, SequentialBatches

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
    "Wrapped",
    "collate",
    "make_loader",
    "measure_latents",
    "verify",
]
