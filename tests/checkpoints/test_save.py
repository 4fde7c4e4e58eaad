"""`ldm.save`: any model as a file that describes itself, and the public face of the package."""

import subprocess
import sys

import pytest
import torch
from diffusers_data import noise, randomized, same_weights
from diffusers_models import MODELS
from diffusers_models import build as build_described
from torch import nn

import ldm
from ldm import config as configuration
from ldm.arguments import remembers_arguments
from ldm.checkpoints import native
from ldm.checkpoints.description import Description, NotExpressible
from ldm.conditioning import ClassEmbedder, Conditioner, Embedder
from ldm.conditioning.bert import BERTEmbedder
from ldm.conditioning.image import ImageEmbedder
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.models.autoencoding_engine import AutoencodingEngine
from ldm.models.discriminator import NLayerDiscriminator
from ldm.models.dit import DiT
from ldm.models.unet import UNetModel
from ldm.models.vit import VisionTransformer
from ldm.sampling import sample

DD = {
    "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": (1, 2),
    "num_res_blocks": 1, "attn_resolutions": (8,), "num_groups": 4,
}  # fmt: skip
UNET = {
    "in_channels": 3, "out_channels": 3, "model_channels": 8, "num_res_blocks": 1, "channel_mult": (1, 2),
    "attention_resolutions": (2,), "num_heads": 2, "num_groups": 4,
}  # fmt: skip


def vit() -> VisionTransformer:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)


def latent_diffusion(**changes) -> LatentDiffusion:
    parts = {
        "first_stage": AutoencoderKL(DD, 3),
        "network": UNetModel(**UNET, context_dim=6),
        "denoiser": Denoiser(DiscreteSchedule(betas=torch.linspace(1e-3, 0.02, 50)), "v"),
        "conditioner": Conditioner([ClassEmbedder(4, 6, drop=0.2)]),
        "image_size": (16, 16),
        "latent_scale": torch.tensor([0.5, 1.0, 2.0]),
        "sampler_defaults": {"ddim": {"spacing": "trailing"}},
    }
    return LatentDiffusion(**(parts | changes))


def two_conditions() -> LatentDiffusion:
    text = BERTEmbedder(dim=8, depth=1, vocab_size=50, max_length=5)
    embedders = [text, ImageEmbedder(vit(), dim=8, kind="crossattn")]
    return latent_diffusion(
        network=UNetModel(**UNET, context_dim=8), conditioner=Conditioner(embedders), denoiser=flow()
    )


def flow() -> Denoiser:
    return Denoiser(FlowSchedule(), "flow")


MADE_IN_PYTHON = {
    "kl": lambda: AutoencoderKL(DD, 3),
    "vq": lambda: VQModel({**DD, "double_z": False}, n_embed=7, embed_dim=3, remap=[1, 2]),
    "engine": lambda: AutoencodingEngine(DD, dict(DD)),
    "unet": lambda: UNetModel(**UNET),
    "dit": lambda: DiT(input_size=8, patch_size=2, depth=1, hidden_size=32, num_heads=2),
    "vit": vit,
    "discriminator": lambda: NLayerDiscriminator(ndf=4, n_layers=1),
    "classes": latent_diffusion,
    "texts-and-images": two_conditions,
    "pixels": lambda: latent_diffusion(
        first_stage=IdentityFirstStage(),
        network=DiT(input_size=16, patch_size=4, in_channels=3, depth=1, hidden_size=32, num_heads=2),
        denoiser=Denoiser(EDMSchedule(), "edm", sigma_data=0.3),
        conditioner=None,
        sampler_defaults=None,
        clip_x0=True,
    ),
}


@pytest.mark.parametrize("name", MADE_IN_PYTHON)
def test_a_model_made_in_python_is_loaded_again(name, tmp_path):
    model = randomized(MADE_IN_PYTHON[name]()).eval()
    path = ldm.save(model, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "model.safetensors"
    again = ldm.load(path)
    assert type(again) is type(model) and not again.training
    assert same_weights(again, model)
    assert again.description.weights == "raw" and ldm.load(path, ema=False)
    assert again.description.model == Description.read(native.read_description(path), "here").model


@pytest.mark.parametrize("name", ["classes", "pixels"])
def test_it_draws_the_same(name, tmp_path):
    model = randomized(MADE_IN_PYTHON[name]()).eval()
    again = ldm.load(ldm.save(model, tmp_path / "model.safetensors"))
    cond = model.conditioner({"label": torch.tensor([0, 3])}) if model.conditioner.keys else None
    options = {"n": 2, "steps": 3, "seed": 5, "sampler": "ddim", "cond": cond}
    assert torch.equal(sample(again, **options), sample(model, **options))
    x = noise(2, *model.latent_shape)
    assert torch.equal(again.to_image(x), model.to_image(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_keeps_its_description(name, tmp_path):
    model = build_described(name)
    native.save_model(tmp_path / "a.safetensors", model.state_dict(), model.description)
    loaded = ldm.load(tmp_path / "a.safetensors")
    again = ldm.load(ldm.save(loaded, tmp_path / "b.safetensors"))
    assert same_weights(again, model)
    for key in ("classes", "image_size", "sampling", "weights", "step"):
        assert again.description[key] == model.description[key]


def test_what_takes_a_parts_place_is_what_is_described(tmp_path):
    model = randomized(latent_diffusion()).eval()
    model.denoiser = flow()
    again = ldm.load(ldm.save(model, tmp_path / "model.safetensors"))
    assert again.denoiser.prediction == "flow"
    model.first_stage_model = AutoencoderKL(DD, 3)
    with pytest.raises(NotExpressible, match="LatentDiffusion.first_stage was replaced"):
        ldm.save(model, tmp_path / "other.safetensors")


def test_a_changed_model_is_refused(tmp_path):
    model = UNetModel(**UNET)
    model.out.append(nn.Conv2d(3, 3, 1))
    with pytest.raises(NotExpressible, match=r"changed after it was made: out\.3\.bias; out\.3\.weight"):
        ldm.save(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"saved as \.safetensors"):
        ldm.save(UNetModel(**UNET), tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_description_is_a_mapping_that_says_what_its_file_says():
    tree = {"target": "ldm.models.unet.UNetModel", "params": {}}
    known = Description(tree, classes=["a"], step=3)
    plain = {"format": "ldm/1", "model": tree, "classes": ["a"], "sampling": None, "weights": None, "step": 3}
    assert known.plain() == plain and known == plain and known.get("notes", "none") == "none"
    assert Description.read(plain, "here") == known and Description.read(known, "here") is known
    assert known.replaced(step=4).step == 4 and known.step == 3
    assert known != {**plain, "step": 4}


# Classes of one's own


class OwnNetwork(nn.Module):
    def __init__(self, channels: int, table=None):
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, t, context=None, y=None):
        return self.conv(x)


@remembers_arguments
class OwnEmbedder(Embedder):
    def __init__(self, how: object = None):
        super().__init__("label", "vector", 0.0)
        self.how = how


def pixels(network: nn.Module, conditioner: Conditioner | None = None) -> LatentDiffusion:
    return LatentDiffusion(IdentityFirstStage(), network, flow(), conditioner, image_size=8)


@pytest.fixture
def importable(monkeypatch):
    """This module under a name that a config can give."""
    monkeypatch.setitem(sys.modules, "own_parts", sys.modules[__name__])
    return lambda **params: configuration.instantiate(
        {"target": "own_parts.OwnNetwork", "params": params}, allow_foreign=True
    )


def test_a_class_of_ones_own_from_a_config_is_saved_and_loaded_by_who_trusts_it(importable, tmp_path):
    model = randomized(pixels(importable(channels=3))).eval()
    before = torch.get_rng_state()
    path = ldm.save(model, tmp_path / "model.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"own_parts\.OwnNetwork' is outside ldm"):
        ldm.load(path)
    config = {"task": "diffusion", "network": {"target": "own_parts.OwnNetwork"}}
    again = ldm.load(path, config=config)
    assert type(again.network) is OwnNetwork and same_weights(again, model)
    assert torch.equal(sample(again, n=1, steps=2), sample(model, n=1, steps=2))


def test_parts_that_cannot_be_described_are_named_all_at_once(importable, tmp_path):
    odd = Conditioner([OwnEmbedder(how=lambda x: x)])
    with pytest.raises(NotExpressible) as caught:
        ldm.save(pixels(OwnNetwork(3), odd), tmp_path / "model.safetensors")
    assert len(caught.value.reasons) == 2
    assert "LatentDiffusion.network is a test_save.OwnNetwork" in str(caught.value)
    assert "LatentDiffusion.conditioner.embedders.0.how is a function" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# The public face


def test_public_names_are_listed_and_come_on_first_use():
    assert ldm.__all__ == ["__version__", "convert", "draw", "load", "sample", "save", "train"]
    assert set(ldm.__all__) <= set(dir(ldm))
    assert all(callable(getattr(ldm, name)) for name in ldm.__all__[1:])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ldm.nothing  # noqa: B018


def test_saving_loads_no_lightning():
    code = "import sys, ldm; ldm.save, ldm.convert; print('pytorch_lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
