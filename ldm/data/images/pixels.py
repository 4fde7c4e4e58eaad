"""From an image file of any kind to a square tensor."""

import errno
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor

from ldm.data.loading.order import uniform01

# Pillow's own hard limit (twice MAX_IMAGE_PIXELS): a small file can claim a size that fills the memory.
MAX_PIXELS = 178_956_970

# How much larger than its target an image stays after the cheap part of a reduction: at 3 the result agrees
# with one exact resize to 54 dB, about 8-bit rounding.
_REDUCING_GAP = 3.0

_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]  # left, top, right, bottom
Colour = tuple[int, int, int]


class BadImageError(ValueError):
    """A file that cannot be read as an image; holds one string, which survives the way out of a worker."""


class Decoded(NamedTuple):
    """A decoded file, as stored: the turn to upright is cheaper for the part that is wanted.

    image: in its own mode, possibly decoded at a fraction of its size.
    shrink: by how much, exactly.
    stored_size: (width, height) at full size.
    orientation: EXIF's number, 1 to 8.
    """

    image: Image.Image
    shrink: float
    stored_size: tuple[int, int]
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image at full size."""
        width, height = self.stored_size
        return (height, width) if self.orientation >= 5 else (width, height)

    def stored_box(self, box: Box) -> Box:
        """Where a box of the upright image at full size lies in `image`."""
        left, top, right, bottom = box
        if self.orientation >= 5:
            left, top, right, bottom = top, left, bottom, right
        width, height = self.stored_size
        if self.orientation in (2, 3, 7, 8):
            left, right = width - right, width - left
        if self.orientation in (3, 4, 6, 7):
            top, bottom = height - bottom, height - top
        return left / self.shrink, top / self.shrink, right / self.shrink, bottom / self.shrink

    def turned(self, part: Image.Image) -> Image.Image:
        """A part of `image`, turned upright."""
        return part if self.orientation == 1 else part.transpose(_TURNS[self.orientation])


def read_image(path: str, shrink_to: int | None = None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode a file; of an animation, the first frame.

    Args:
        shrink_to: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size as long as the shorter side keeps
            three times this many pixels: faster on photographs, and not visible after the resize.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        BadImageError: the file is missing, truncated, too large or no image; names the file and the reason.
    """
    # Pillow has one limit for the whole process; it follows when someone asks for more.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            stored_size, shrink = image.size, _draft(image, shrink_to)
            image.load()
            if shrink == 1.0:
                stored_size = image.size  # Pillow may have turned a TIFF
            return Decoded(image, shrink, stored_size, _orientation(image))
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _MACHINE_ERRORS:
            raise  # this machine's trouble, not the file's
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"{error}, more than max_pixels={max_pixels}"
        raise BadImageError(f"{path}: {reason}") from error


def _draft(image: Image.Image, shrink_to: int | None) -> float:
    """Ask the JPEG decoder for a smaller image; returns by how much it shrinks."""
    if shrink_to is None:
        return 1.0
    width = image.width
    scale = _REDUCING_GAP * shrink_to / min(image.size)
    drafted = image.draft(None, (int(image.width * scale), int(image.height * scale)))
    return 1.0 if drafted is None else width / drafted[1][2]  # the box is the whole image in the new pixels


def _orientation(image: Image.Image) -> int:
    # Read after load(): Pillow turns TIFFs itself while loading and then drops their tag.
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata beside whole pixels: the pixels are taken as they stand
        return 1
    return orientation if orientation in _TURNS else 1


def parse_background(background: str | Colour) -> Colour:
    """A colour as (red, green, blue) in 0..255; names and hex strings ("white", "#102030") are understood."""
    try:
        values = ImageColor.getrgb(background)[:3] if isinstance(background, str) else tuple(background)
    except ValueError:
        values = ()
    if len(values) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
        raise ValueError(f"background must be three integers in 0..255 or a colour, got {background!r}")
    return values


def to_rgb(image: Image.Image, background: Colour = (255, 255, 255)) -> Image.Image:
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
    kind, top = ("float", 1) if image.mode == "F" else ("integer", 65535)
    if not (low >= 0 and high <= top):  # also refuses NaN
        raise ValueError(
            f"{kind} image with values in [{low}, {high}]: only [0, {top}] has a defined brightness"
        )
    # 65535 / 255 = 257, rounded to the nearest
    grey = np.rint(values * 255.0) if kind == "float" else (values.astype(np.uint32) + 128) // 257
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
            which uses 0.8 to 1), but not under `size` pixels where the image has them.
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


def cut_square(decoded: Decoded, box: Box, size: int, background: Colour = (255, 255, 255)) -> Image.Image:
    """A square box of the upright image, antialiased to (size, size) RGB.

    Pillow's bicubic widens its kernel with the reduction, so it averages all pixels, and overshoots at edges
    less than Lanczos. Large reductions first average whole blocks, as guided-diffusion's repeated halving.
    """
    image, stored = to_rgb(decoded.image, background), decoded.stored_box(box)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=stored, reducing_gap=_REDUCING_GAP)
    return decoded.turned(square)


def to_pixels(image: Image.Image, channels: int) -> torch.Tensor:
    """An RGB image as uint8 (C, H, W); one channel is luma (ITU-R 601)."""
    array = np.array(image if channels == 3 else image.convert("L"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1).contiguous()


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 in [-1, 1], both ends exact."""
    return pixels.float().div_(127.5).sub_(1.0)
