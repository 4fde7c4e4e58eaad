import numpy as np
import pytest
import torch

from ldm.data.images.grid import image_grid, pixel_grid, to_uint8


def test_black_white_and_middle():
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    assert to_uint8(images).ravel().tolist() == [0, 128, 255]


def test_every_level_survives():
    levels = torch.arange(256).float().reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(levels / 127.5 - 1)[0], np.arange(256).reshape(16, 16))


def test_values_outside_and_not_finite():
    images = torch.tensor([-7.0, 7.0, float("nan"), float("inf"), -float("inf")]).reshape(5, 1, 1, 1)
    assert to_uint8(images).ravel().tolist() == [0, 255, 0, 255, 0]


def test_channels_go_last_and_one_channel_goes():
    colour = torch.zeros(2, 3, 4, 5)
    colour[:, 0] = 1
    pixels = to_uint8(colour)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels[0, 0, 0].tolist() == [255, 128, 128]
    assert to_uint8(colour[:, :1]).shape == (2, 4, 5)


def test_shapes_that_are_no_images():
    for shape in ((3, 4, 4), (1, 2, 4, 4), (1, 4, 4, 4)):
        with pytest.raises(ValueError, match="must be"):
            to_uint8(torch.zeros(shape))


def test_places_of_the_tiles():
    pixels = np.stack([np.full((64, 80, 3), 10 * i, dtype=np.uint8) for i in range(5)])
    sheet = np.asarray(pixel_grid(pixels, columns=3, padding=2))
    assert sheet.shape == (2 * 66 + 2, 3 * 82 + 2, 3)
    for i in range(5):
        top, left = 2 + (i // 3) * 66, 2 + (i % 3) * 82
        assert (sheet[top : top + 64, left : left + 80] == 10 * i).all()
    assert (sheet[68:, 2 + 2 * 82 :] == 255).all()  # nobody's place is white
    assert (sheet[:2] == 255).all()
    assert (sheet[:, :2] == 255).all()


def test_about_a_square_and_small_images_enlarged():
    sheet = image_grid(torch.zeros(5, 1, 32, 32), padding=0)
    assert sheet.size == (3 * 64, 2 * 64)
    assert image_grid(torch.zeros(1, 3, 100, 70), padding=0).size == (70, 100)


def test_nothing_to_show():
    with pytest.raises(ValueError, match="needs images"):
        image_grid(torch.zeros(0, 1, 4, 4))
    with pytest.raises(ValueError, match="columns"):
        image_grid(torch.zeros(1, 1, 4, 4), columns=0)
