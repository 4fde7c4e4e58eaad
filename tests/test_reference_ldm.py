"""Two whole latent diffusion models against the original's numbers, weights under the original's names."""

import functools

import pytest
import torch
from reference_data import filled, load_cases, load_config, load_keys, relative_error

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import ClassifierFreeGuidance
from ldm.diffusion.objective import Objective
from ldm.diffusion.precision import expand
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiscreteSchedule
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.models.unet import UNetModel


def fill(module: torch.nn.Module, keys: dict[str, list[int]], prefix: str) -> torch.nn.Module:
    weights = {
        name.removeprefix(prefix): filled(name, tuple(keys[name])) for name in keys if name.startswith(prefix)
    }
    module.load_state_dict(weights)
    return module.eval()


class Original:
    """The original's LatentDiffusion out of its YAML, by hand."""

    def __init__(self, folder: str):
        params, keys = load_config(folder)["model"]["params"], load_keys(folder)
        self.cases = load_cases(folder)
        self.schedule = DiscreteSchedule(
            "linear", params["timesteps"], params["linear_start"], params["linear_end"]
        )
        self.denoiser = Denoiser(self.schedule, params["parameterization"])
        self.network = fill(UNetModel(**params["unet_config"]["params"]), keys, "model.diffusion_model.")
        stage = params["first_stage_config"]["params"]
        if "n_embed" in stage:
            first_stage = VQModel(stage["ddconfig"], stage["n_embed"], stage["embed_dim"])
        else:
            first_stage = AutoencoderKL(stage["ddconfig"], stage["embed_dim"])
        self.first_stage = fill(first_stage, keys, "first_stage_model.")
        self.scale_factor = params["scale_factor"]
        self.cond = self.uncond = {}
        if "labels" in self.cases:
            name = "cond_stage_model.embedding.weight"
            table = torch.nn.Embedding.from_pretrained(filled(name, tuple(keys[name])))
            self.cond = {"context": table(self.cases["labels"])[:, None]}  # (B, 1, D)
            self.uncond = {"context": table(self.cases["null_labels"])[:, None]}


@functools.cache
def original(folder: str) -> Original:
    return Original(folder)


@pytest.fixture(params=["compvis-ldm-class", "compvis-ldm-unconditional"])
def model(request):
    with torch.no_grad():
        yield original(request.param)


def sample(model: Original, sampler: str) -> torch.Tensor:
    sigmas = model.schedule.sigmas(model.cases["ddim_steps"].item(), "uniform")
    denoise = ClassifierFreeGuidance(
        model.denoiser.bind(model.network), model.cond, model.uncond, model.cases["guidance_scale"].item()
    )
    x = SAMPLERS[sampler](denoise, model.schedule.start(model.cases["noise"], sigmas[0]), sigmas)
    return (x * model.schedule.scale(sigmas[-1])).float()


def test_schedule(model):
    torch.testing.assert_close(
        model.schedule.alphas_cumprod.float(), model.cases["alphas_cumprod"], rtol=0, atol=0
    )
    sigmas = model.schedule.sigmas(model.cases["ddim_steps"].item(), "uniform")
    assert model.schedule.time(sigmas).tolist() == [*reversed(model.cases["ddim_timesteps"].tolist()), 0]


def test_conditioning(model):
    for name, cond in (("context", model.cond), ("null_context", model.uncond)):
        if name in model.cases:
            assert torch.equal(cond["context"], model.cases[name])


def test_noise_and_loss(model):
    cases = model.cases
    sigma = model.schedule.sigma(cases["timesteps"])
    x = cases["latent"] + expand(sigma, cases["noise"]) * cases["noise"]
    x_in, t = model.denoiser.network_input(x, sigma)
    assert torch.equal(t, cases["timesteps"].float())
    assert relative_error(x_in, cases["q_sample"]) < 1e-6
    result = Objective(model.denoiser).at(model.network, cases["latent"], cases["noise"], sigma, model.cond)
    assert relative_error(result["loss"].mean(), cases["loss"]) < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_sample(model, sampler):
    assert relative_error(sample(model, sampler), model.cases[f"{sampler}_sample"]) < 1e-4


def test_euler_is_ddim(model):
    assert relative_error(sample(model, "euler"), model.cases["ddim_sample"]) < 1e-4


def test_decoding_a_sample(model):
    image = model.first_stage.decode_latent(model.cases["ddim_sample"] / model.scale_factor)
    assert relative_error(image, model.cases["decoded"]) < 1e-4
