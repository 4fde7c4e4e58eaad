"""First stages and their losses against the outputs of the original implementations (tests/reference)."""

import pytest
import torch
import torch.nn.functional as F
from reference_data import filled, filled_state_dict, load_cases, load_config, load_keys, relative_error

from ldm.losses import LPIPS, AutoencoderLoss
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian, VQModel

TOLERANCE = 1e-5


def filled_first_stage(kind, params, keys, prefix=""):
    """Built from an original config's params and filled; names and shapes are those under `prefix`."""
    params = {name: params[name] for name in ("ddconfig", "embed_dim", "n_embed") if name in params}
    model = kind(**params)
    expected = {name.removeprefix(prefix): shape for name, shape in keys.items() if name.startswith(prefix)}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
    model.load_state_dict({name: filled(prefix + name, tuple(shape)) for name, shape in expected.items()})
    return model.eval()


@pytest.mark.parametrize("folder", ["compvis-autoencoder-kl", "compvis-autoencoder-kl-linear-attention"])
def test_kl_autoencoder_matches_the_reference(folder):
    cases = load_cases(folder)
    params = load_config(folder)["model"]["params"]
    model = filled_first_stage(AutoencoderKL, params, load_keys(folder))
    with torch.no_grad():
        posterior = model.encode(cases["image"])
        decoded = model.decode(posterior.mode())
    assert relative_error(posterior.parameters, cases["moments"]) < TOLERANCE
    assert relative_error(posterior.mode(), cases["mode"]) < TOLERANCE
    assert relative_error(posterior.kl(), cases["kl"]) < TOLERANCE
    assert relative_error(decoded, cases["reconstruction"]) < TOLERANCE


def test_vq_model_matches_the_reference():
    cases = load_cases("compvis-vq")
    params = load_config("compvis-vq")["model"]["params"]
    model = filled_first_stage(VQModel, params, load_keys("compvis-vq"))
    with torch.no_grad():
        prequant = model.encode_to_prequant(cases["image"])
        output = model.quantize(prequant)
        decoded = model.decode(output.quantized)
    assert relative_error(prequant, cases["prequant"]) < TOLERANCE
    assert torch.equal(output.indices, cases["indices"])
    assert relative_error(output.quantized, cases["quantized"]) < TOLERANCE
    assert relative_error(output.codebook_loss, cases["codebook_loss"]) < TOLERANCE
    assert relative_error(decoded, cases["reconstruction"]) < TOLERANCE


def test_the_papers_beta_weighs_the_other_gradient():
    cases = load_cases("compvis-vq")
    params = load_config("compvis-vq")["model"]["params"]
    model = filled_first_stage(VQModel, params, load_keys("compvis-vq"))
    # as numbers both orders give (1 + beta) |q - z|^2; they differ in where the gradients go
    model.quantize.legacy = False
    z = cases["prequant"].clone().requires_grad_()
    legacy_z = cases["prequant"].clone().requires_grad_()
    model.quantize(z).codebook_loss.backward()
    model.quantize.legacy = True
    model.quantize(legacy_z).codebook_loss.backward()
    assert relative_error(z.grad, 0.25 * legacy_z.grad) < TOLERANCE


@pytest.mark.parametrize("folder", ["compvis-ldm-class", "compvis-ldm-unconditional"])
def test_first_stage_of_a_latent_diffusion_model_decodes_as_the_reference(folder):
    cases, config = load_cases(folder), load_config(folder)["model"]["params"]
    first_stage = config["first_stage_config"]
    kind = {"AutoencoderKL": AutoencoderKL, "VQModelInterface": VQModel}[first_stage["target"].split(".")[-1]]
    model = filled_first_stage(kind, first_stage["params"], load_keys(folder), prefix="first_stage_model.")
    with torch.no_grad():
        decoded = model.decode_latent(cases["ddim_sample"] / config.get("scale_factor", 1.0))
    assert relative_error(decoded, cases["decoded"]) < TOLERANCE


LOSS = "autoencoder-loss-kl"


@pytest.fixture(scope="module")
def reference_loss():
    loss = AutoencoderLoss(**load_config(LOSS)["params"], perceptual=LPIPS(pretrained=False))
    keys = load_keys(LOSS)
    assert {name: list(parameter.shape) for name, parameter in loss.named_parameters()} == keys
    weights = filled_state_dict(keys)
    weights = {name: value.abs() if ".lin" in name else value for name, value in weights.items()}
    weights["logvar"] = torch.zeros(())
    loss.load_state_dict({**loss.state_dict(), **weights})
    return loss


@pytest.fixture
def reference_step():
    cases = load_cases(LOSS)
    weight = torch.nn.Parameter(filled("last.weight", (3, 8, 3, 3)))
    reconstruction = F.conv2d(cases["features"], weight, filled("last.bias", (3,)), padding=1)
    assert relative_error(reconstruction, cases["reconstruction"]) < TOLERANCE
    return cases, weight, reconstruction


def test_lpips_matches_the_reference(reference_loss, reference_step):
    cases, _, reconstruction = reference_step
    distance = reference_loss.perceptual_loss(cases["image"], reconstruction)
    assert relative_error(distance, cases["lpips"]) < TOLERANCE


def test_generator_loss_matches_the_reference(reference_loss, reference_step):
    cases, weight, reconstruction = reference_step
    posterior, step = DiagonalGaussian(cases["moments"]), int(cases["global_step"])
    loss, logs = reference_loss.generator_loss(cases["image"], reconstruction, posterior, step, weight)
    loss.backward()
    assert relative_error(loss, cases["generator_loss"]) < TOLERANCE
    assert relative_error(weight.grad, cases["last_layer_grad"]) < TOLERANCE
    names = ["total_loss", "logvar", "kl_loss", "nll_loss", "rec_loss", "d_weight", "disc_factor", "g_loss"]
    for name in names:
        assert relative_error(logs[name], cases[f"log/{name}"]) < TOLERANCE, name


def test_discriminator_loss_matches_the_reference(reference_loss, reference_step):
    cases, _, reconstruction = reference_step
    loss, logs = reference_loss.discriminator_loss(cases["image"], reconstruction, int(cases["global_step"]))
    assert relative_error(loss, cases["discriminator_loss"]) < TOLERANCE
    for name in ("disc_loss", "logits_real", "logits_fake"):
        assert relative_error(logs[name], cases[f"log/{name}"]) < TOLERANCE, name
