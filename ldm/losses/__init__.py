"""Losses of the first stage: perceptual distances and the autoencoder's adversarial objective."""

from ldm.losses.autoencoder import FROZEN_PREFIX, AutoencoderLoss
from ldm.losses.efficientnet import EfficientNetLite0, EfficientNetPerceptual
from ldm.losses.lpips import LPIPS
from ldm.weights.fetching import WeightsError

__all__ = [
    "FROZEN_PREFIX",
    "LPIPS",
    "AutoencoderLoss",
    "EfficientNetLite0",
    "EfficientNetPerceptual",
    "WeightsError",
]
