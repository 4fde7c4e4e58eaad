"""Random movements of training images, each a function of (seed, position of the sample in the run)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.random import uniform
from ldm.training.settings import not_negative


@dataclass
class AugmentSettings:
    """How far training images of a classifier are moved at random; all 0 for not at all.

    rotate: most degrees to either side. scale: most growth or shrinkage, 0.1 for a tenth. shift: most of a
    side, along each axis. What comes in from outside the image is its border.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0

    def __post_init__(self):
        not_negative(rotate=self.rotate, scale=self.scale, shift=self.shift)


def moved(images: Tensor, positions: Tensor, settings: AugmentSettings, seed: int) -> Tensor:
    """Images turned, scaled and shifted about their centre, sampled bilinearly.

    Args:
        images: (B, C, H, W).
        positions: int64 (B,), positions of the samples in the run.
        settings: the largest of each movement; drawn uniformly (the scale's logarithm) up to it.

    Returns:
        (B, C, H, W), `images` itself where nothing moves.
    """
    if not (settings.rotate or settings.scale or settings.shift):
        return images
    draws = 2 * uniform(seed, "train/augment", positions, (4,)) - 1  # (B, 4) in (-1, 1)
    angle = draws[:, 0] * math.radians(settings.rotate)
    scale = torch.exp(draws[:, 1] * math.log1p(settings.scale))
    height, width = images.shape[2:]
    # affine_grid maps places of the output to places of the input, both in [-1, 1] along each side.
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    across, down = (2 * settings.shift * draws[:, 2:]).unbind(1)
    rows = [
        torch.stack([cos, -sin * height / width, across], dim=1),
        torch.stack([sin * width / height, cos, down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    grid = grid.to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
