"""Reading image files."""

import errno
from typing import NamedTuple

from PIL import Image

# Pillow's own hard limit (twice MAX_IMAGE_PIXELS): a small file can claim a size that fills the memory.
MAX_PIXELS = 178_956_970

# How much larger than its target an image stays after the cheap part of a reduction (DCT scaling of a JPEG,
# whole-number box averages). At 3 the result agrees with one exact resize to 54 dB, about 8-bit rounding.
REDUCING_GAP = 3.0

_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ORIENTATION_TAG = 0x0112

Box = tuple[float, float, float, float]  # left, top, right, bottom


class BadImageError(ValueError):
    """A file that cannot be read as an image; holds one string, which survives the way out of a worker."""


class Decoded(NamedTuple):
    """A decoded file, as stored: the turn to upright is cheaper for the part that is wanted.

    image: in its own mode, possibly decoded at a fraction of its size.
    shrink: by how much, exactly; the last column and row of a shrunk image may stand for less than a pixel.
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
        turn = _TURNS.get(self.orientation)
        return part if turn is None else part.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str, shrink_to: int | None = None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode a file; of an animation, the first frame.

    Args:
        path: the file.
        shrink_to: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size as long as the shorter side keeps
            three times this many pixels: faster on photographs, and not visible after the resize.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        BadImageError: the file is missing, truncated, too large or no image. It names the file and the
            reason.
    """
    _raise_pillow_limit(max_pixels)
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
            reason = (
                f"{error}, more than max_pixels={max_pixels}: a guard against files that would fill the "
                "memory; raise it if the image is meant to be so large"
            )
        raise BadImageError(f"{path}: {reason}") from error


def _raise_pillow_limit(max_pixels: int) -> None:
    # Pillow has one limit for the whole process; it follows when someone asks for more, and never goes down.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _draft(image: Image.Image, shrink_to: int | None) -> float:
    """Ask the JPEG decoder for a smaller image; returns by how much it shrinks."""
    if shrink_to is None:
        return 1.0
    width = image.width
    scale = REDUCING_GAP * shrink_to / min(image.size)
    drafted = image.draft(None, (int(image.width * scale), int(image.height * scale)))
    return 1.0 if drafted is None else width / drafted[1][2]  # the box is the whole image in the new pixels


def _orientation(image: Image.Image) -> int:
    # Read after load(): Pillow turns TIFFs itself while loading and then drops their tag.
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata beside whole pixels: the pixels are taken as they stand
        return 1
    return orientation if orientation in _TURNS else 1
