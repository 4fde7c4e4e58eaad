"""Every published model with reference numbers, through `ldm.load` itself: a checkpoint and a YAML."""

import pytest
import torch
from published_files import (
    averaged_copies,
    lightning_checkpoint,
    schedule_buffers,
    weights_of,
    write_config,
)
from reference_data import ROOT, load_cases, load_config, relative_error

import ldm
from ldm.diffusion.denoiser import expand
from ldm.diffusion.objective import Objective
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL, VQModel

OUTPUT, END_POINT = 1e-4, 1e-3


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def config_of(folder: str) -> str:
    return str(ROOT / folder / "config.yaml")


def as_published(folder: str, path) -> str:
    """A whole model's checkpoint: raw weights that are not the reference's, and averaged ones that are."""
    weights = weights_of(folder)
    state = {name: value * 0.9 if name.startswith("model.") else value for name, value in weights.items()}
    state |= schedule_buffers() | averaged_copies(weights, "model.")
    return lightning_checkpoint(path, state)


# First stages


@pytest.mark.parametrize("folder", ["compvis-autoencoder-kl", "compvis-autoencoder-kl-linear-attention"])
def test_kl_autoencoder(folder, tmp_path):
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 3, 4, 4)}
    path = lightning_checkpoint(tmp_path / "model.ckpt", weights_of(folder) | loss)
    model, cases = ldm.load(path, config_of(folder)), load_cases(folder)
    assert isinstance(model, AutoencoderKL) and not model.training
    posterior = model.encode(cases["image"])
    assert relative_error(posterior.parameters, cases["moments"]) < OUTPUT
    assert relative_error(posterior.mode(), cases["mode"]) < OUTPUT
    assert relative_error(posterior.kl(), cases["kl"]) < OUTPUT
    assert relative_error(model.decode(posterior.mode()), cases["reconstruction"]) < OUTPUT


def test_vq_model(tmp_path):
    path = lightning_checkpoint(tmp_path / "model.ckpt", weights_of("compvis-vq"))
    model, cases = ldm.load(path, config_of("compvis-vq")), load_cases("compvis-vq")
    assert isinstance(model, VQModel)
    prequant = model.encode_to_prequant(cases["image"])
    assert relative_error(prequant, cases["prequant"]) < OUTPUT
    output = model.quantize(prequant)
    assert torch.equal(output.indices, cases["indices"])
    assert relative_error(output.quantized, cases["quantized"]) < OUTPUT
    assert relative_error(output.codebook_loss, cases["codebook_loss"]) < OUTPUT
    assert relative_error(model.decode(output.quantized), cases["reconstruction"]) < OUTPUT


def test_averaged_autoencoder(tmp_path):
    """An autoencoder's averages are of the whole of itself, its loss included."""
    weights = weights_of("compvis-vq")
    discriminator = {"loss.discriminator.main.0.weight": torch.ones(1)}
    raw = {name: value * 0.5 for name, value in weights.items()} | discriminator
    state = raw | averaged_copies(weights | discriminator, "")
    path, cases = lightning_checkpoint(tmp_path / "model.ckpt", state), load_cases("compvis-vq")
    model = ldm.load(path, config_of("compvis-vq"))
    assert relative_error(model.encode_to_prequant(cases["image"]), cases["prequant"]) < OUTPUT
    raw_model = ldm.load(path, config_of("compvis-vq"), ema=False)
    assert torch.equal(raw_model.decoder.conv_out.weight, raw["decoder.conv_out.weight"])


# Whole latent diffusion models

LDM = ["compvis-ldm-class", "compvis-ldm-unconditional"]


@pytest.fixture(scope="module", params=LDM)
def published(request, tmp_path_factory):
    folder = request.param
    path = as_published(folder, tmp_path_factory.mktemp(folder) / "model.ckpt")
    return folder, ldm.load(path, config_of(folder)), load_cases(folder), path


def conditions(model, cases):
    if "labels" not in cases:
        return None, None
    return tuple(model.conditioner({"class_label": cases[name]}) for name in ("labels", "null_labels"))


def test_conditioner(published):
    _, model, cases, _ = published
    cond, uncond = conditions(model, cases)
    if cond is not None:
        assert torch.equal(cond["crossattn"], cases["context"])
        assert torch.equal(uncond["crossattn"], cases["null_context"])
        assert torch.equal(model.conditioner({"label": cases["labels"]})["crossattn"], cases["context"])


def test_prediction_and_loss(published):
    _, model, cases, _ = published
    assert isinstance(model, LatentDiffusion) and model.description["weights"] == "ema"
    cond, _ = conditions(model, cases)
    raw = model.predict(cases["latent"], cases["timesteps"], cond)
    assert relative_error(raw, cases["denoised_output"]) < OUTPUT
    context = None if cond is None else cond["crossattn"]
    assert torch.equal(model(cases["latent"], cases["timesteps"], context=context), raw)
    sigma = model.denoiser.schedule.sigma(cases["timesteps"])
    noisy = cases["latent"] + expand(sigma, cases["noise"]) * cases["noise"]
    x, t = model.denoiser.network_input(noisy, sigma)
    assert relative_error(x, cases["q_sample"]) < OUTPUT and torch.equal(t, cases["timesteps"].float())
    result = Objective(model.denoiser).at(model.model, cases["latent"], cases["noise"], sigma, cond or {})
    assert relative_error(result["loss"].mean(), cases["loss"]) < OUTPUT


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_sampling(published, sampler):
    _, model, cases, _ = published
    cond, uncond = conditions(model, cases)
    z = ldm.sample(
        model,
        n=len(cases["noise"]),
        cond=cond,
        uncond=uncond,
        sampler=sampler,
        steps=cases["ddim_steps"].item(),
        guidance=cases["guidance_scale"].item(),
        noise=cases["noise"],
        **({"eta": 0.0} if sampler == "ddim" else {}),
    )
    assert relative_error(z, cases[f"{sampler}_sample"]) < END_POINT
    if sampler == "ddim":
        assert relative_error(model.to_image(z), cases["decoded"]) < END_POINT


def test_decoding_and_encoding(published):
    folder, model, cases, _ = published
    assert relative_error(model.to_image(cases["ddim_sample"]), cases["decoded"]) < OUTPUT
    image = cases["decoded"].clamp(-1, 1)
    scale = load_config(folder)["model"]["params"]["scale_factor"]
    assert torch.equal(model.decode(cases["ddim_sample"] / scale), model.to_image(cases["ddim_sample"]))
    assert type(model.encode(image)) is type(model.first_stage_model.encode(image))
    assert relative_error(model.to_latent(image), model.first_stage_model.moments(image)[0] * scale) < 1e-6


def test_raw_weights_are_others(published):
    """The comparison can fail: the raw weights in the same file give other numbers."""
    folder, _, cases, path = published
    model = ldm.load(path, config_of(folder), ema=False)
    assert model.description["weights"] == "raw"
    raw = model.predict(cases["latent"], cases["timesteps"], conditions(model, cases)[0])
    assert relative_error(raw, cases["denoised_output"]) > 1e-2


def test_native_round_trip(published, tmp_path):
    """What was loaded describes itself: written as a native file it loads without the YAML, bit for bit."""
    from ldm.checkpoints import native

    _, model, cases, _ = published
    native.save_model(tmp_path / "model.safetensors", model.state_dict(), model.description)
    again = ldm.load(tmp_path / "model.safetensors")
    cond = conditions(model, cases)[0]
    arguments = cases["latent"], cases["timesteps"], cond
    assert torch.equal(again.predict(*arguments), model.predict(*arguments))
    assert torch.equal(again.to_image(cases["noise"]), model.to_image(cases["noise"]))
    assert again.sampler_defaults == model.sampler_defaults


# sgm


@pytest.mark.parametrize("folder", ["sgm-unet-sd2", "sgm-unet-sdxl"])
def test_sgm_network(folder, tmp_path):
    torch.save(weights_of(folder), tmp_path / "unet.pt")
    model, cases = ldm.load(tmp_path / "unet.pt", config_of(folder)), load_cases(folder)
    output = model(cases["x"], cases["timesteps"], context=cases["context"], y=cases.get("y"))
    assert relative_error(output, cases["output"]) < OUTPUT


def diffusion_engine() -> dict:
    """SD 2's and the KL autoencoder's reference networks in one DiffusionEngine, a class as its context."""
    modules = "sgm.modules.diffusionmodules."
    first_stage = load_config("compvis-autoencoder-kl")["model"]
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": 0.5,
            "network_config": load_config("sgm-unet-sd2"),
            "denoiser_config": {
                "target": modules + "denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": 1000,
                    "scaling_config": {"target": modules + "denoiser_scaling.VScaling"},
                    "discretization_config": {"target": modules + "discretizer.LegacyDDPMDiscretization"},
                },
            },
            "first_stage_config": {
                "target": "sgm.models.autoencoder.AutoencoderKL",
                "params": {
                    name: first_stage["params"][name] for name in ("embed_dim", "ddconfig", "lossconfig")
                },
            },
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {
                    "emb_models": [
                        {
                            "is_trainable": True,
                            "input_key": "cls",
                            "ucg_rate": 0.2,
                            "target": "sgm.modules.encoders.modules.ClassEmbedder",
                            "params": {"embed_dim": 24, "n_classes": 5, "add_sequence_dim": True},
                        }
                    ]
                },
            },
        },
    }


def test_sgm_engine(tmp_path):
    state = {f"model.diffusion_model.{n}": v for n, v in weights_of("sgm-unet-sd2").items()}
    state |= {f"first_stage_model.{n}": v for n, v in weights_of("compvis-autoencoder-kl").items()}
    table = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    state |= {"conditioner.embedders.0.embedding.weight": table, "denoiser.sigmas": torch.ones(1000)}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    model = ldm.load(
        tmp_path / "model.ckpt", write_config(tmp_path / "config.yaml", {"model": diffusion_engine()})
    )
    unet, stage = load_cases("sgm-unet-sd2"), load_cases("compvis-autoencoder-kl")
    output = model.predict(unet["x"], unet["timesteps"], {"crossattn": unet["context"]})
    assert relative_error(output, unet["output"]) < OUTPUT
    assert relative_error(model.to_latent(stage["image"]), 0.5 * stage["mode"]) < OUTPUT
    assert relative_error(model.to_image(0.5 * stage["mode"]), stage["reconstruction"]) < OUTPUT
    cond = model.conditioner({"cls": torch.tensor([4, 1])})
    assert torch.equal(cond["crossattn"], table[[4, 1]][:, None])
    assert not model.conditioner.unconditional(2)["crossattn"].any()  # sgm's absent condition is zeros
    # its v: x0 = x / (1 + s^2) - s / sqrt(1 + s^2) F(x / sqrt(1 + s^2), t)
    sigma = model.denoiser.schedule.sigmas_all[[17, 800]]
    s = sigma.float().reshape(-1, 1, 1, 1)
    x = unet["x"] * (1 + s**2).sqrt()
    context = {"crossattn": unet["context"]}
    raw = model.predict(unet["x"], torch.tensor([17.0, 800.0]), context)
    expected = x / (1 + s**2) - s / (1 + s**2).sqrt() * raw
    assert relative_error(model.denoise_fn(context)(x, sigma), expected) < OUTPUT
    assert model.denoiser.schedule.sigmas_all[-1].item() == pytest.approx(14.6146, abs=1e-4)  # known of SD
    assert ldm.sample(model, cond=cond, steps=2, guidance=2.0).shape == (2, 4, 8, 8)


# OpenAI


@pytest.mark.parametrize("folder", ["adm-unet-learned-sigma", "adm-unet-new-order"])
def test_adm(folder, tmp_path):
    torch.save(weights_of(folder), tmp_path / "ema_0.9999_100000.pt")
    model, cases = ldm.load(tmp_path / "ema_0.9999_100000.pt", config_of(folder)), load_cases(folder)
    y = {"y": cases["y"]} if "y" in cases else {}
    output = model(cases["x"], cases["timesteps"], **y)
    assert relative_error(output, cases["output"]) < OUTPUT
    cond = model.conditioner(y) if y else None
    if y:
        assert torch.equal(cond["vector"], model.conditioner({"label": cases["y"]})["vector"])
    assert torch.equal(model.predict(cases["x"], cases["timesteps"], cond), output)
    assert model.denoiser.learned_variance == (folder == "adm-unet-learned-sigma")
    steps = len(cases["respaced_timesteps"])
    sample = ldm.sample(model, cond=cond, sampler="ddim", steps=steps, noise=cases["noise"])
    assert relative_error(sample, cases["ddim_sample"]) < END_POINT
    assert (
        ldm.sample(model, n=None, cond=cond, sampler="ddpm", steps=2, noise=cases["noise"]).isfinite().all()
    )


def test_adm_network_alone(tmp_path):
    folder = "adm-unet-learned-sigma"
    torch.save(weights_of(folder), tmp_path / "model.pt")
    config = {name: value for name, value in load_config(folder).items() if name != "diffusion"}
    model, cases = ldm.load(tmp_path / "model.pt", config), load_cases(folder)
    assert relative_error(model(cases["x"], cases["timesteps"], y=cases["y"]), cases["output"]) < OUTPUT
    assert list(model.state_dict()) == list(weights_of(folder))


def test_adm_classifier(tmp_path):
    folder = "adm-classifier-attention"
    torch.save(weights_of(folder), tmp_path / "classifier.pt")
    model, cases = ldm.load(tmp_path / "classifier.pt", config_of(folder)), load_cases(folder)
    assert relative_error(model(cases["x"], cases["timesteps"]), cases["logits"]) < OUTPUT
