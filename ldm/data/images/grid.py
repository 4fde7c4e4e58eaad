"""Tensors back to pictures."""

import math

import numpy as np
import torch
from PIL import Image

_SMALLEST_TILE = 64  # smaller images are enlarged, or a grid of them could not be seen
_LEAD_GAP = 8  # pixels


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1], C 1 or 3 -> uint8 (B, H, W, 3) or (B, H, W) for one channel.

    Values outside are clamped, NaN is black.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1 or 3, H, W), got {tuple(images.shape)}")
    # 127.5 (x + 1), rounded: black and white come out as 0 and 255.
    values = (images.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5
    pixels = values.round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def image_grid(images: torch.Tensor, columns: int | None = None, padding: int = 2) -> Image.Image:
    """One picture of images (B, C, H, W) in [-1, 1], row by row; `columns` defaults to about a square."""
    return pixel_grid(to_uint8(images), columns, padding)


def pixel_grid(pixels: np.ndarray, columns: int | None = None, padding: int = 2) -> Image.Image:
    """`image_grid` of uint8 pixels (B, H, W) or (B, H, W, 3).

    Raises:
        ValueError: no images, or no columns.
    """
    if len(pixels) == 0 or (columns is not None and columns < 1):
        raise ValueError(f"a grid needs images and columns, got {len(pixels)} images in {columns} columns")
    factor = max(1, -(-_SMALLEST_TILE // max(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1] + padding, pixels.shape[2] + padding
    shape = (rows * height + padding, columns * width + padding, *pixels.shape[3:])
    sheet = np.full(shape, 255, dtype=np.uint8)
    for i, tile in enumerate(pixels):
        top, left = (i // columns) * height + padding, (i % columns) * width + padding
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return Image.fromarray(sheet)


def led_rows(leads: np.ndarray, pixels: np.ndarray, each: int, padding: int = 2) -> Image.Image:
    """A row for every lead: the lead, a gap, and `each` images of `pixels` in their order.

    Args:
        leads, pixels: uint8 tiles of one size, (R, H, W) or (R, H, W, 3), and up to R * each.
    """
    front, rows = pixel_grid(leads, 1, padding), pixel_grid(pixels, each, padding)
    left = front.width + _LEAD_GAP
    sheet = Image.new(rows.mode, (left + rows.width, max(front.height, rows.height)), "white")
    sheet.paste(front, (0, 0))
    sheet.paste(rows, (left, 0))
    return sheet
