"""From a decoded image of any kind to a square tensor."""

import numpy as np
import torch
from PIL import Image, ImageColor

from ldm.data.images.decode import REDUCING_GAP, Box, Decoded
from ldm.data.loading.hashing import uniform01


def parse_background(background: str | tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour as (red, green, blue) in 0..255; names and hex strings ("white", "#102030") are understood."""
    if isinstance(background, str):
        try:
            return ImageColor.getrgb(background)[:3]
        except ValueError:
            raise ValueError(f'background: {background!r} is no colour, try "white" or "#ff8800"') from None
    values = tuple(background)
    if len(values) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
        raise ValueError(f"background must be three integers in 0..255, got {background!r}")
    return values


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Any mode to 8-bit RGB: transparent parts show `background`, 16-bit values are scaled, not clipped.

    Colour profiles are not applied, CMYK is converted without one. ValueError for modes without a defined
    range (32-bit integers beyond 16 bits, floats outside [0, 1]) or without a conversion.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _deep_to_8bit(image)
    if image.mode == "La":  # premultiplied
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(backdrop, image)
    return image.convert("RGB")


def _deep_to_8bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(
                f"float image with values in [{low}, {high}]: only [0, 1] has a defined brightness"
            )
        grey = np.rint(values * 255.0)
    else:
        if low < 0 or high > 65535:
            raise ValueError(
                f"integer image with values in [{low}, {high}]: only 0..65535 has a defined brightness"
            )
        grey = (values.astype(np.uint32) + 128) // 257  # 65535 / 255 = 257, rounded to the nearest
    result = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a PNG's one transparent 16-bit value
        result = Image.merge("LA", (result, Image.fromarray((values != transparent).astype(np.uint8) * 255)))
    return result


def square_box(
    width: int, height: int, size: int, crop: str, crop_scale: tuple[float, float], seed: int, position: int
) -> tuple[int, int, int, int]:
    """The square of an image that becomes the sample, as (left, top, right, bottom) in whole pixels.

    Args:
        crop: "center" takes the largest square of the middle. "random" takes a square whose side is a random
            share, within crop_scale, of the shorter side, at a random place (guided-diffusion's random crop,
            which uses 0.8 to 1); it does not go under `size` pixels where the image has them, so that
            cropping alone never enlarges.
        seed, position: address of the randomness; position < 0 asks for the plain view, the centre.
    """
    shorter = min(width, height)
    if crop == "center" or position < 0:
        left, top = (width - shorter) // 2, (height - shorter) // 2  # whole pixels: halves would blur
        return left, top, left + shorter, top + shorter
    share, across, down = uniform01(seed, "crop", position, np.arange(3)).tolist()
    side = round(shorter * (crop_scale[0] + share * (crop_scale[1] - crop_scale[0])))
    side = max(side, min(size, shorter))
    left, top = int(across * (width - side + 1)), int(down * (height - side + 1))  # each place equally likely
    return left, top, left + side, top + side


def cut_square(
    decoded: Decoded, box: Box, size: int, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """A square box of the upright image, antialiased to (size, size) RGB.

    Pillow's bicubic widens its kernel with the reduction, so it averages all pixels instead of picking some,
    and overshoots at edges less than Lanczos. Large reductions first average whole blocks (the idea of
    guided-diffusion's repeated halving, in one step and for any factor).
    """
    square = to_rgb(decoded.image, background).resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=decoded.stored_box(box),
        reducing_gap=REDUCING_GAP,
    )
    return decoded.turned(square)


def to_pixels(image: Image.Image, channels: int) -> torch.Tensor:
    """An RGB image as uint8 (C, H, W); one channel is luma (ITU-R 601)."""
    array = np.array(image if channels == 3 else image.convert("L"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1).contiguous()


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 in [-1, 1], both ends exact."""
    return pixels.float().div_(127.5).sub_(1.0)
