"""Reconstructions of first stages whose error is known in closed form."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from ldm.data.images.given import Pictures, find_images
from ldm.evaluation.reconstruction import first_stage_of, image_side, latents_file, reconstruct
from ldm.models.autoencoder import IdentityFirstStage

SIDE, OFFSET = 8, 0.25


class Darker(nn.Module):
    """Its latent is every second pixel; what it gives back is the image, grey by grey darker."""

    latent_channels, image_channels, downsampling_factor = 3, 3, 2

    def __init__(self, offset: float = OFFSET):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))

    def moments(self, x):
        self.shown = x
        return x[..., ::2, ::2], torch.full_like(x[..., ::2, ::2], 0.1)

    def decode_latent(self, z):
        return self.shown - self.offset


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "more/b.png", "more/c.png")):
        # Bright enough that nothing is clamped.
        grey = np.random.default_rng(i).integers(64, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(grey).save(folder / name)
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "empty.png").touch()
    return folder


def test_figures_of_a_known_error(folder):
    pictures = Pictures(*find_images(folder), SIDE, 3)
    groups = list(reconstruct(Darker(), pictures, batch_size=2, workers=0))
    figures = [figure for group in groups for figure in group.figures]
    assert [figure.path for figure in figures] == ["a.png", "more/b.png", "more/c.png"]
    assert [pictures.paths[i] for group in groups for i in group.indices] == [f.path for f in figures]
    for figure in figures:
        assert figure.psnr == pytest.approx(10 * math.log10(4 / OFFSET**2), abs=1e-4)
        assert figure.l1 == pytest.approx(OFFSET, abs=1e-6)
    for group in groups:
        assert torch.allclose(group.reconstructions, group.images - OFFSET)
        assert torch.equal(group.mean, group.images[..., ::2, ::2]) and group.std.eq(0.1).all()
    assert [path for path, _ in pictures.unreadable] == ["empty.png", "bad.png"]


def test_latents_of_what_could_be_read(folder, tmp_path):
    pictures = Pictures(*find_images(folder), SIDE, 3)
    path = tmp_path / "latents.safetensors"
    with latents_file(path, len(pictures), {"model": "here", "weights": None}) as keep:
        groups = list(reconstruct(Darker(), pictures, workers=0))
        for group in groups:
            keep(group)
        assert not path.exists()
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("mean"), torch.cat([group.mean for group in groups]))
        assert json.loads(file.metadata()["paths"]) == ["a.png", "more/b.png", "more/c.png"]
        assert file.metadata()["model"] == "here" and "weights" not in file.metadata()
    with latents_file(tmp_path / "none.safetensors", 3, {}):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "latents.safetensors"]


def test_what_cannot_be_reconstructed(folder):
    pictures = Pictures(*find_images(folder), SIDE, 3)
    with pytest.raises(ValueError, match="reconstructions are not finite"):
        list(reconstruct(Darker(math.nan), pictures, workers=0))
    with pytest.raises(ValueError, match="it holds a Linear, which is no first stage"):
        first_stage_of(nn.Linear(1, 1), "it")
    with pytest.raises(ValueError, match="works on the pixels themselves"):
        first_stage_of(IdentityFirstStage(3), "it")


def test_the_side_of_the_images():
    model = Darker()
    with pytest.raises(ValueError, match="it does not say at which size it was trained"):
        image_side(model, None, "it")
    for given in ([16, 32], None):
        model.description = {"image_size": given}
        with pytest.raises(ValueError, match="does not say"):
            image_side(model, None, "it")
    model.description = {"image_size": [16, 16]}
    assert image_side(model, None, "it") == 16 and image_side(model, 24, "it") == 24
    with pytest.raises(ValueError, match="size 15 is not a multiple of the .* factor 2"):
        image_side(model, 15, "it")
