import functools
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.images.pixels import (
    BadImageError,
    Decoded,
    cut_square,
    normalize_pixels,
    parse_background,
    read_image,
    square_box,
    to_pixels,
    to_rgb,
)

GREEN = (0, 200, 0)
RED, BLUE = (250, 10, 20), (10, 30, 240)
T = Image.Transpose
# What a camera did to the picture that carries this orientation: the inverse of what makes it upright.
STORED = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM}
STORED |= {5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


def picture(width=24, height=16):
    """Left half red, right half blue, a white block in the upper left corner."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    image.paste((255, 255, 255), (0, 0, width // 4, height // 4))
    return image


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return str(path)


def pixels(path, background=GREEN):
    """The whole upright image, through the same steps as a sample but for the resize."""
    decoded = read_image(path)
    return np.asarray(decoded.turned(to_rgb(decoded.image, background))).astype(int)


def resized(image, box, size):
    return np.asarray(cut_square(Decoded(image, 1.0, image.size, 1), box, size)).astype(float)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.jpg", "a.gif"])
def test_formats(tmp_path, name):
    options = (
        {"lossless": True}
        if name == "a.webp"
        else {"quality": 100, "subsampling": 0}
        if name == "a.jpg"
        else {}
    )
    result = pixels(saved(tmp_path, picture(), name, **options))
    assert np.abs(result - np.asarray(picture())).max() <= (6 if name == "a.jpg" else 0)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, name):
    stored = picture() if STORED[orientation] is None else picture().transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True}
        if name == "a.webp"
        else {"quality": 100, "subsampling": 0}
        if name == "a.jpg"
        else {}
    )
    result = pixels(saved(tmp_path, stored, name, exif=exif, **options))
    assert result.shape == (16, 24, 3)
    assert np.abs(result - np.asarray(picture())).max() <= 8


def test_broken_exif_leaves_the_pixels(tmp_path):
    path = saved(tmp_path, picture(), "a.png", exif=b"Exif\0\0no tiff header here")
    assert np.array_equal(pixels(path), np.asarray(picture()))


def mask():
    alpha = Image.new("L", (24, 16), 255)
    alpha.paste(0, (12, 0, 24, 16))
    alpha.paste(51, (0, 12, 12, 16))  # a fifth
    return alpha


@pytest.mark.parametrize(
    "name, mode", [("a.png", "RGBA"), ("a.webp", "RGBA"), ("a.tif", "RGBA"), ("a.png", "LA")]
)
def test_alpha_over_background(tmp_path, name, mode):
    image = picture().convert(mode)
    image.putalpha(mask())
    result = pixels(saved(tmp_path, image, name, **({"lossless": True} if name == "a.webp" else {})))
    opaque = np.asarray(picture().convert(mode).convert("RGB")).astype(int)
    assert np.array_equal(result[:12, :12], opaque[:12, :12])
    assert (result[:, 12:] == GREEN).all()
    assert np.abs(result[12:, :12] - (0.2 * opaque[12:, :12] + 0.8 * np.array(GREEN))).max() <= 1


def test_palettes(tmp_path):
    flat = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(saved(tmp_path, flat, "flat.png")), np.asarray(picture()))
    one = flat.getpixel((20, 10))
    result = pixels(saved(tmp_path, flat, "one.png", transparency=one))
    assert (result[:, 12:] == GREEN).all() and (result[8:, :12] == RED).all()
    alpha = picture().convert("RGBA")
    alpha.putalpha(mask())
    many = alpha.quantize(16, method=Image.Quantize.FASTOCTREE)
    result = pixels(saved(tmp_path, many, "many.png"))
    assert read_image(str(tmp_path / "many.png")).image.mode == "P"
    assert (result[:, 12:] == GREEN).all() and np.abs(result[8, 3] - RED).max() < 12


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_one_transparent_colour(tmp_path, mode):
    image = picture().convert(mode, dither=Image.Dither.NONE)
    colour = image.getpixel((20, 10))
    result = pixels(saved(tmp_path, image, "a.png", transparency=1 if mode == "1" and colour else colour))
    assert (result[:, 12:] == GREEN).all()
    assert (result[0, 0] == 255).all()


def test_one_bit_and_grey(tmp_path):
    bits = picture().convert("1", dither=Image.Dither.NONE)
    assert set(np.unique(pixels(saved(tmp_path, bits, "bits.png")))) <= {0, 255}
    grey = picture().convert("L")
    assert np.array_equal(pixels(saved(tmp_path, grey, "grey.png"))[..., 1], np.asarray(grey))


@pytest.mark.parametrize("name, order", [("a.png", "<u2"), ("a.tif", "<u2"), ("b.tif", ">u2")])
def test_sixteen_bits_are_scaled(tmp_path, name, order):
    values = np.linspace(0, 65535, 16 * 24).reshape(16, 24).astype(order)
    result = pixels(saved(tmp_path, Image.fromarray(values), name))
    assert np.array_equal(result[..., 0], np.rint(values.astype(float) / 257).astype(int))
    assert result.min() == 0 and result.max() == 255 and len(np.unique(result)) > 250


def test_sixteen_bits_with_a_transparent_value(tmp_path):
    values = np.full((16, 24), 5000, dtype=np.uint16)
    values[:, 12:] = 60000
    result = pixels(saved(tmp_path, Image.fromarray(values), "a.png", transparency=60000))
    assert (result[:, 12:] == GREEN).all() and (result[:, :12] == round(5000 / 257)).all()


def test_wide_integers_and_floats(tmp_path):
    values = np.linspace(0, 65535, 16 * 24).reshape(16, 24)
    result = pixels(saved(tmp_path, Image.fromarray(values.astype(np.int32)), "i.tif"))
    assert result.max() == 255 and abs(result.mean() - 127.5) < 1
    result = pixels(saved(tmp_path, Image.fromarray((values / 65535).astype(np.float32)), "f.tif"))
    assert result.max() == 255 and abs(result.mean() - 127.5) < 1
    with pytest.raises(ValueError, match="0..65535"):
        pixels(saved(tmp_path, Image.fromarray(values.astype(np.int32) * 2), "i.tif"))
    with pytest.raises(ValueError, match="float image"):
        pixels(saved(tmp_path, Image.fromarray(values.astype(np.float32)), "f.tif"))


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk(tmp_path, name):
    result = pixels(
        saved(tmp_path, picture().convert("CMYK"), name, **({"quality": 98} if name == "a.jpg" else {}))
    )
    assert np.abs(result[10, 4] - RED).max() < 12 and np.abs(result[10, 20] - BLUE).max() < 12


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_give_their_first_frame(tmp_path, name):
    other = Image.new("RGB", (24, 16), (0, 0, 0))
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, picture(), name, save_all=True, append_images=[other, other], **options)
    assert Image.open(path).n_frames >= 2
    assert np.array_equal(pixels(path), np.asarray(picture()))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.gif", "a.bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.03, 0.5])
def test_truncated_files_are_named(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BadImageError, match=name):
        read_image(str(path))


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(BadImageError, match="text.png: UnidentifiedImageError"):
        read_image(str(tmp_path / "text.png"))
    with pytest.raises(BadImageError, match="gone.png: FileNotFoundError"):
        read_image(str(tmp_path / "gone.png"))


def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    small = saved(tmp_path, Image.new("RGB", (40, 30)), "small.png")
    with pytest.raises(BadImageError, match="40x30 pixels, more than max_pixels=1000"):
        read_image(small, max_pixels=1000)
    header = bytes.fromhex("89504e470d0a1a0a0000000d49484452")
    chunk = (100_000).to_bytes(4, "big") * 2 + bytes.fromhex("0800000000")  # 10 gigapixels in 33 bytes
    checksum = zlib.crc32(b"IHDR" + chunk).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header + chunk + checksum + bytes([0, 0, 0, 9]) + b"IDAT" + bytes(9))
    with pytest.raises(BadImageError, match="bomb.png: .*10000000000 pixels.*, more than max_pixels="):
        read_image(str(tmp_path / "bomb.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as if 40x30 were beyond Pillow's own limit
    with pytest.raises(BadImageError, match="1200 pixels.*max_pixels=200"):
        read_image(small, max_pixels=200)
    assert read_image(small, max_pixels=1200).size == (40, 30)


def test_backgrounds():
    assert parse_background("white") == (255, 255, 255)
    assert parse_background("#102030") == parse_background([16, 32, 48]) == (16, 32, 48)
    for wrong in ("no colour", (1, 2), (0, 0, 256), (0.5, 0, 0)):
        with pytest.raises(ValueError, match="background"):
            parse_background(wrong)


def test_native_size_is_exact():
    noise = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    box = square_box(60, 40, 40, "center", (1, 1), 0, -1)
    assert box == (10, 0, 50, 40)
    assert np.array_equal(resized(image, box, 40), noise[:, 10:50])


def test_reduction_is_antialiased():
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    for size in (64, 50, 100):
        small = resized(Image.fromarray(checks), (0, 0, 256, 256), size)
        assert np.abs(small - 127.5).max() < 12
    ramp = np.tile(np.linspace(0, 255, 512), (512, 1)).astype(np.uint8)
    small = resized(Image.fromarray(ramp), (0, 0, 512, 512), 32)
    centres = (np.arange(32) + 0.5) * 16 - 0.5  # half-pixel centres: no shift
    assert np.abs(small[5, :, 0] - centres * 255 / 511)[1:-1].max() < 1.5


@functools.cache
def photo(width, height):
    """A sum of low frequencies."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:height, :width]
    values = np.zeros((height, width, 3))
    for _ in range(12):
        fx, fy, phase = rng.uniform(0, 0.05), rng.uniform(0, 0.05), rng.uniform(0, 6.28)
        values += rng.normal(size=3) * np.sin(fx * x + fy * y + phase)[..., None]
    return Image.fromarray(np.clip(values * 30 + 128, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("width, height", [(800, 600), (803, 601)])
def test_fast_jpeg_decoding_is_not_visible(tmp_path, width, height, orientation):
    """Also where 8 does not divide the size, so that the last column of the small image is a partial one."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, photo(width, height), "a.jpg", quality=95, exif=exif)
    whole, fast = read_image(path), read_image(path, shrink_to=24)
    assert whole.size == fast.size == ((height, width) if orientation >= 5 else (width, height))
    assert whole.shrink == 1 and fast.shrink == 8 and fast.image.width == -(-width // 8)
    assert read_image(path, shrink_to=200).shrink == 1
    for box in (
        square_box(*whole.size, 24, "center", (1, 1), 0, -1),
        square_box(*whole.size, 24, "random", (1, 1), 0, 5),
    ):
        exact, quick = (np.asarray(cut_square(decoded, box, 24)).astype(float) for decoded in (whole, fast))
        assert np.sqrt(((exact - quick) ** 2).mean()) < 1.2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_cut_from_the_upright_image(tmp_path, orientation):
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    stored = noise if STORED[orientation] is None else noise.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = read_image(saved(tmp_path, stored, "a.png", exif=exif))
    assert decoded.size == (60, 40)
    assert np.array_equal(
        np.asarray(cut_square(decoded, (7, 11, 27, 31), 20)), np.asarray(noise)[11:31, 7:27]
    )


def test_random_crops():
    boxes = [square_box(100, 60, 20, "random", (0.5, 0.9), 3, position) for position in range(2000)]
    sides = np.array([right - left for left, _, right, _ in boxes])
    left, top, right, bottom = np.array(boxes).T
    assert (right - left == bottom - top).all()
    assert (left >= 0).all() and (top >= 0).all() and (right <= 100).all() and (bottom <= 60).all()
    assert sides.min() == 30 and sides.max() == 54
    assert left.min() == 0 and right.max() == 100 and top.min() == 0 and bottom.max() == 60
    assert boxes[7] == square_box(100, 60, 20, "random", (0.5, 0.9), 3, 7)
    assert boxes[7] != square_box(100, 60, 20, "random", (0.5, 0.9), 4, 7)
    assert square_box(100, 60, 20, "random", (0.5, 0.9), 3, -1) == (20, 0, 80, 60)


def test_random_crops_do_not_enlarge_by_themselves():
    boxes = [square_box(100, 64, 60, "random", (0.1, 1.0), 0, position) for position in range(200)]
    assert min(right - left for left, _, right, _ in boxes) == 60
    assert square_box(10, 4, 60, "random", (0.1, 1.0), 0, 5)[2:] != (0, 0)
    assert {
        r - x for x, _, r, _ in (square_box(10, 4, 60, "random", (0.1, 1.0), 0, p) for p in range(50))
    } == {4}


def test_to_tensors():
    rgb = to_pixels(picture(), 3)
    assert rgb.shape == (3, 16, 24) and rgb.dtype == torch.uint8 and tuple(rgb[:, 10, 20].tolist()) == BLUE
    grey = to_pixels(picture(), 1)
    assert grey.shape == (1, 16, 24) and grey[0, 0, 0] == 255
    values = normalize_pixels(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.tolist() == [-1.0, 1.0] and values.dtype == torch.float32
