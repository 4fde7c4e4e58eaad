"""Published files of DiT, SiT and timm through `ldm.load`, alone and as parts of a model that is sampled."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import description, randomized, save_run

import ldm
from ldm.conditioning import ClassLabel, Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import DiscreteSchedule, FlowSchedule
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.dit import DiT
from ldm.models.vit import VisionTransformer
from ldm.weights.errors import CheckpointError

CLASSES = 5
DIT = dict(
    input_size=8, in_channels=4, patch_size=2, hidden_size=24, depth=2, num_heads=2, num_classes=CLASSES,
    learn_sigma=True,
)  # fmt: skip
VAE = dict(
    ddconfig=dict(
        z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 1, 1, 1], num_res_blocks=1,
        num_groups=4,
    ),
    embed_dim=4,
)  # fmt: skip
VIT = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5)


def part(target: str, params: dict) -> dict:
    return {"target": target, "params": params}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A DiT's bare state dict, and an autoencoder's as Stable Diffusion's authors publish it."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(randomized(DiT(**DIT)).state_dict(), folder / "DiT-XL-2-256x256.pt")
    torch.save({"state_dict": randomized(AutoencoderKL(**VAE)).state_dict()}, folder / "vae.ckpt")
    return folder


def assembled(files, convention: str) -> LatentDiffusion:
    """As the docstring of `DiT` shows it."""
    network = ldm.load(
        files / "DiT-XL-2-256x256.pt", config=part("ldm.models.dit.DiT", {**DIT, "convention": convention})
    )
    schedule = DiscreteSchedule("sqrt_linear", linear_start=1e-4, linear_end=2e-2)
    denoiser = (
        Denoiser(schedule, learned_variance=True) if convention == "dit" else Denoiser(FlowSchedule(), "flow")
    )
    first_stage = ldm.load(files / "vae.ckpt", config=part("ldm.models.autoencoder.AutoencoderKL", VAE))
    return LatentDiffusion(
        first_stage,
        network,
        denoiser,
        Conditioner([ClassLabel(CLASSES)]),
        image_size=64,
        latent_scale=0.18215,
    )


@pytest.mark.parametrize("convention", ["dit", "sit"])
def test_a_published_network_draws_classes_with_an_autoencoder_of_its_own_file(files, convention):
    model = assembled(files, convention)
    assert not model.network.training
    cond = model.conditioner({"label": torch.tensor([3, 3, 1])})
    assert cond["vector"].tolist() == [3, 3, 1]
    assert model.conditioner.unconditional(2)["vector"].tolist() == [CLASSES] * 2  # the table's last row
    samplers = ["euler", "ddim"] + (["ddpm"] if convention == "dit" else [])
    for sampler in samplers:
        z = ldm.sample(model, cond=cond, guidance=4.0, sampler=sampler, steps=5, seed=1)
        images = model.to_image(z)
        assert images.shape == (3, 3, 64, 64) and images.isfinite().all()
    same = torch.ones(2, 4, 8, 8)
    z = ldm.sample(model, cond={"vector": torch.tensor([3, 1])}, noise=same, guidance=4.0, steps=5)
    assert not torch.allclose(z[0], z[1], rtol=1e-3)  # the class tells
    none = ldm.sample(model, cond={"vector": torch.tensor([3, 1])}, noise=same, guidance=0.0, steps=5)
    torch.testing.assert_close(none[0], none[1], rtol=1e-4, atol=1e-3)


def test_guidance_is_the_publishers(files):
    """eps = uncond + scale (cond - uncond), of all channels that are not the variance's. (DiT's script guides
    three of the four to reproduce its published numbers, and names all four as the standard.)"""
    model = assembled(files, "dit")
    schedule, network = model.denoiser.schedule, model.network
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 700.0])
    y = torch.tensor([2, 4])
    with torch.no_grad():
        c, u = (network(x, t, y=labels)[:, :4] for labels in (y, torch.full((2,), CLASSES)))
        eps = u + 4.0 * (c - u)
        a = schedule.alphas_cumprod[t.long()].float()[:, None, None, None]
        expected = (x - (1 - a).sqrt() * eps) / a.sqrt()
        cond, uncond = {"vector": y}, model.conditioner.unconditional(2)
        found = model.denoise_fn(cond, uncond, 4.0)(x / a.sqrt(), schedule.sigma(t))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_run_with_a_class_table_in_the_network_is_one_file(tmp_path):
    """`ClassLabel` and a DiT with `num_classes`: what a training run of them leaves is loaded and sampled."""
    network = part("ldm.models.dit.DiT", {**DIT, "in_channels": 3, "num_classes": 3, "learn_sigma": False})
    conditioner = part(
        "ldm.conditioning.Conditioner",
        {"embedders": [part("ldm.conditioning.ClassLabel", {"num_classes": 3})]},
    )
    described = description()
    described["model"]["params"] |= {"network": network, "conditioner": conditioner}
    model = ldm.load(save_run(tmp_path / "run", described))
    cond = model.conditioner({"label": torch.arange(3)})
    images = model.to_image(ldm.sample(model, cond=cond, guidance=2.0, steps=3))
    assert images.shape == (3, 3, 16, 16) and images.isfinite().all()


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("distilled", [False, True])
def test_timm_files_load_strictly(tmp_path, wrap, distilled):
    params = {**VIT, "distilled": distilled}
    published = randomized(VisionTransformer(**params)).eval()
    state = published.state_dict()
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "vit.pth")
    save_file(state, tmp_path / "model.safetensors")  # as timm puts them on a hub, without a description
    x = torch.rand(2, 3, 8, 8)
    for file in ("vit.pth", "model.safetensors"):
        loaded = ldm.load(tmp_path / file, config=part("ldm.models.vit.VisionTransformer", params))
        with torch.no_grad():
            assert torch.equal(loaded(x), published(x)) and not loaded.training
    with pytest.raises(CheckpointError, match="dist_token"):
        other = {**VIT, "distilled": not distilled}
        ldm.load(tmp_path / "vit.pth", config=part("ldm.models.vit.VisionTransformer", other))


def test_timm_files_load_by_the_size_s_name(tmp_path):
    small = {"depth": 1, "num_classes": 3}
    published = VisionTransformer("vit_base_patch32_224", **small).eval()
    torch.save(published.state_dict(), tmp_path / "vit.pth")
    config = part("ldm.models.vit.VisionTransformer", {"size": "vit_base_patch32_224", **small})
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ldm.load(tmp_path / "vit.pth", config=config)(x), published(x))
