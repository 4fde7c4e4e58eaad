"""`LatentDiffusion`: what it makes of its parts, and what it refuses."""

import pytest
import torch
from gaussian_models import BestNetwork
from torch import nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import FlowSchedule
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage


class Halves(IdentityFirstStage):
    """A first stage of known moments: a factor of 2, mean 3 x, deviation 0.1."""

    downsampling_factor = 2

    def __init__(self):
        super().__init__(2)
        self.downsampling_factor = 2

    def moments(self, x):
        small = 3 * x[..., ::2, ::2]
        return small, torch.full_like(small, 0.1)

    def decode_latent(self, z):
        return (z / 3).repeat_interleave(2, -1).repeat_interleave(2, -2)


def halves(**options) -> LatentDiffusion:
    denoiser = Denoiser(FlowSchedule(), "flow")
    return LatentDiffusion(Halves(), BestNetwork(denoiser), denoiser, image_size=[8, 4], **options)


def test_shift_and_scale_of_the_latent():
    model = halves(latent_shift=[1.0, 2.0], latent_scale=0.5)
    assert model.latent_shape == (2, 4, 2)
    image = torch.rand(3, 2, 4, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    z = model.to_latent(image)
    expected = (3 * image[..., ::2, ::2] - torch.tensor([1.0, 2.0]).view(2, 1, 1)) * 0.5
    assert torch.allclose(z, expected)
    assert torch.allclose(model.to_image(z), image, atol=1e-6)
    noise = torch.ones_like(z)
    assert torch.allclose(model.to_latent(image, noise), expected + 0.05)
    assert torch.allclose(model.denormalize(model.normalize(z)), z, atol=1e-6)


def test_published_names():
    denoiser = Denoiser(FlowSchedule(), "flow")
    first_stage, network = IdentityFirstStage(2), BestNetwork(denoiser)
    first_stage.weight, network.weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    model = LatentDiffusion(first_stage, network, denoiser, image_size=4)
    names = ["latent_scale", "latent_shift", "first_stage_model.weight", "model.diffusion_model.weight"]
    assert sorted(model.state_dict()) == sorted(names)


def test_parts_that_do_not_fit():
    flow = Denoiser(FlowSchedule(), "flow")
    network = BestNetwork(flow)
    with pytest.raises(ValueError, match="5x4 is not a multiple"):
        LatentDiffusion(Halves(), network, flow, image_size=[5, 4])
    with pytest.raises(ValueError, match="returns 2 channels.* have 3"):
        LatentDiffusion(IdentityFirstStage(3), network, flow, image_size=4)
    with pytest.raises(ValueError, match="out_channels must be 4"):
        LatentDiffusion(IdentityFirstStage(2), network, Denoiser(FlowSchedule(), "flow", True), image_size=4)
    with pytest.raises(ValueError, match="latent_scale has 3 values"):
        halves(latent_scale=[1.0, 2.0, 3.0])
    for value in (0.0, float("nan"), [1.0, 0.0]):
        with pytest.raises(ValueError, match="latent_scale must be finite"):
            halves(latent_scale=value)
    for size in ([8, 8, 8], 0, [8, -2], 8.0):
        with pytest.raises((ValueError, TypeError)):
            LatentDiffusion(IdentityFirstStage(2), network, flow, image_size=size)
    wide = BestNetwork(flow)
    wide.in_channels = 5
    with pytest.raises(ValueError, match="takes 5 channels"):
        LatentDiffusion(IdentityFirstStage(2), wide, flow, image_size=4)
