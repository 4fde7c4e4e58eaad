"""First stages, vector quantizer, posterior and discriminator: closed forms, gradients, shapes, errors."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.models.autoencoder import (
    AutoencoderKL,
    Decoder,
    DiagonalGaussian,
    Encoder,
    IdentityFirstStage,
    VectorQuantizer,
    VQModel,
)
from ldm.models.discriminator import ActNorm, NLayerDiscriminator

DDCONFIG = {
    "ch": 8,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
    "double_z": True,
    "num_groups": 4,
}


def tiny_kl(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(DDCONFIG | changes, embed_dim=2)


def tiny_vq(**options) -> VQModel:
    torch.manual_seed(0)
    return VQModel(DDCONFIG | {"double_z": False}, n_embed=12, embed_dim=2, **options)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def assert_every_parameter_has_a_gradient(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a bias of the keys shifts all of a query's scores alike: softmax ignores it, its gradient is 0
        assert name.endswith(".k.bias") or parameter.grad.abs().sum() > 0, name


# --- the networks


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 4)])
def test_sizes_of_a_kl_autoencoder(size):
    model = tiny_kl()
    reconstruction, posterior = model(images(2, 3, *size))
    assert posterior.mean.shape == (2, 2, size[0] // 2, size[1] // 2)
    assert reconstruction.shape == (2, 3, *size)
    assert (model.latent_channels, model.image_channels, model.downsampling_factor) == (2, 3, 2)
    assert model.last_layer is model.decoder.conv_out.weight


def test_every_parameter_of_a_kl_autoencoder_receives_a_gradient():
    model = tiny_kl()
    reconstruction, posterior = model(images(2, 3, 16, 16))
    (reconstruction.square().mean() + posterior.kl().mean()).backward()
    assert_every_parameter_has_a_gradient(model)


def test_every_parameter_of_a_vq_model_receives_a_gradient():
    model = tiny_vq()
    reconstruction, output = model(images(2, 3, 16, 16))
    (reconstruction.square().mean() + output.codebook_loss).backward()
    assert_every_parameter_has_a_gradient(model)


def test_grayscale():
    model = tiny_kl(in_channels=1, out_ch=1)
    assert model(images(1, 1, 16, 16))[0].shape == (1, 1, 16, 16)
    assert model.image_channels == 1


def test_the_noise_handed_in_makes_the_sample():
    model, x = tiny_kl().eval(), images(2, 3, 16, 16)
    noise = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        first, posterior = model(x, noise)
        expected = model.decode(posterior.mean + posterior.std * noise)
        mean, std = model.moments(x)
        drawn, _ = model(x)
    assert torch.equal(first, expected)
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
    assert torch.equal(model.decode_latent(mean), model.decode(posterior.mode()))
    assert not torch.equal(drawn, first)


def test_moments_and_decode_latent_of_a_vq_model():
    model, x = tiny_vq().eval(), images(2, 3, 16, 16)
    with torch.no_grad():
        mean, std = model.moments(x)
        assert torch.equal(mean, model.encode_to_prequant(x)) and not std.any()
        assert torch.equal(model.decode_latent(mean), model(x)[0])
        output = model.encode(x)
        torch.testing.assert_close(model.decode_code(output.indices, (2, 8, 8)), model(x)[0])


def test_identity_first_stage():
    model, x = IdentityFirstStage(), images(2, 3, 5, 7)
    mean, std = model.moments(x)
    assert torch.equal(mean, x) and not std.any() and torch.equal(model.decode_latent(x), x)
    assert (model.latent_channels, model.downsampling_factor) == (3, 1)
    assert IdentityFirstStage(channels=1).latent_channels == 1


def test_tanh_out_and_give_pre_end():
    z = torch.randn(1, 4, 8, 8)
    plain, bounded, pre_end = (
        Decoder(**DDCONFIG | change) for change in ({}, {"tanh_out": True}, {"give_pre_end": True})
    )
    bounded.load_state_dict(plain.state_dict())
    pre_end.load_state_dict(plain.state_dict())
    assert torch.equal(bounded(z), plain(z).tanh())
    features = pre_end(z)
    assert features.shape == (1, 8, 16, 16)
    assert torch.equal(plain.conv_out(F.silu(plain.norm_out(features))), plain(z))


@pytest.mark.parametrize("options", [{"attn_type": "linear"}, {"use_linear_attn": True}])
def test_linear_attention_by_both_names(options):
    encoder = Encoder(**DDCONFIG | options)
    assert "down.1.attn.0.to_qkv.weight" in encoder.state_dict()


def test_attention_stands_where_the_config_says():
    names = set(Encoder(**DDCONFIG | {"attn_resolutions": [16]}).state_dict())
    assert "down.0.attn.0.q.weight" in names and "down.1.attn.0.q.weight" not in names
    names = set(Encoder(**DDCONFIG | {"attn_resolutions": [], "attn_type": "none"}).state_dict())
    assert not any("attn" in name for name in names)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: tiny_kl(num_groups=32), "num_groups=32 does not divide"),
        (lambda: tiny_kl(attn_resolutions=[12]), r"attn_resolutions \[12\].*\[16, 8\]"),
        (lambda: tiny_kl(double_z=False), "double_z must be True"),
        (lambda: tiny_kl(ch_mul=[1]), "ddconfig.ch_mul is not known.*did you mean ch_mult"),
        (lambda: AutoencoderKL({"ch": 8}, 2), "ddconfig lacks ch_mult, in_channels"),
        (lambda: VQModel(DDCONFIG, n_embed=4, embed_dim=2), "double_z must be False"),
        (lambda: tiny_kl()(images(1, 3, 15, 16)), "multiples of 2, got 15x16"),
        (lambda: tiny_kl()(images(1, 1, 16, 16)), r"images \(B, 3, H, W\)"),
        (lambda: tiny_kl().decoder(torch.zeros(1, 3, 8, 8)), r"latents \(B, 4, h, w\)"),
        (lambda: tiny_kl()(images(1, 3, 16, 16), torch.zeros(1, 2, 4, 4)), "noise of shape"),
    ],
)
def test_errors_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- the posterior


def test_gaussian_against_torch_distributions():
    parameters = torch.randn(3, 4, 5, 6, dtype=torch.float32)
    posterior, other = DiagonalGaussian(parameters), DiagonalGaussian(parameters.flip(0))
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    standard = torch.distributions.Normal(0.0, 1.0)
    to_standard = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1)
    to_other = torch.distributions.kl_divergence(normal, torch.distributions.Normal(other.mean, other.std))
    torch.testing.assert_close(posterior.kl(), to_standard)
    torch.testing.assert_close(posterior.kl(other), to_other.flatten(1).sum(1))
    x = torch.randn_like(posterior.mean)
    torch.testing.assert_close(posterior.nll(x), -normal.log_prob(x).flatten(1).sum(1))
    torch.testing.assert_close(posterior.var, posterior.std**2)


def test_gaussian_clamps_its_log_variance_and_computes_in_float32():
    parameters = torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1).to(torch.bfloat16)
    posterior = DiagonalGaussian(parameters)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert posterior.std.dtype == torch.float32
    assert torch.isfinite(posterior.kl()).all()


def test_gaussian_sample_of_zero_noise_is_the_mode():
    posterior = DiagonalGaussian(torch.randn(2, 4, 3, 3))
    assert torch.equal(posterior.sample(torch.zeros(2, 2, 3, 3)), posterior.mode())


# --- the quantizer


def brute_force_nearest(rows, codebook):
    return (rows[:, None].double() - codebook[None].double()).square().sum(-1).argmin(1)


@settings(max_examples=30, deadline=None)
@given(n_embed=st.integers(1, 40), dim=st.integers(1, 6), offset=st.sampled_from([0.0, 3.0, 1000.0]))
def test_quantizer_chooses_the_nearest_code(n_embed, dim, offset):
    torch.manual_seed(n_embed * 10 + dim)
    quantizer = VectorQuantizer(n_embed, dim)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn(n_embed, dim) + offset)
    z = torch.randn(2, dim, 3, 5) + offset  # far from 0, where |z|^2 - 2 z e + |e|^2 cancels in float32
    output = quantizer(z)
    rows = z.permute(0, 2, 3, 1).reshape(-1, dim)
    expected = brute_force_nearest(rows, quantizer.embedding.weight)
    assert torch.equal(output.indices, expected)
    torch.testing.assert_close(output.quantized, quantizer.embed(expected, (2, 3, 5)))


def test_chunks_do_not_change_the_codes(monkeypatch):
    quantizer, z = VectorQuantizer(7, 3), torch.randn(2, 3, 5, 5)
    whole = quantizer(z).indices
    monkeypatch.setattr("ldm.models.quantize._CHUNK_DISTANCES", 20)
    assert torch.equal(quantizer(z).indices, whole)


def test_quantizer_chooses_exactly_under_autocast():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(512, 4), torch.randn(4, 4, 16, 16)
    with torch.no_grad():
        quantizer.embedding.weight.normal_()
    expected = quantizer(z).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(z)
    assert torch.equal(output.indices, expected)
    assert output.quantized.dtype == torch.float32 and output.codebook_loss.dtype == torch.float32


def test_gradient_passes_straight_through():
    quantizer, z = VectorQuantizer(5, 2), torch.randn(1, 2, 3, 3, requires_grad=True)
    weights = torch.randn(1, 2, 3, 3)
    (quantizer(z).quantized * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert quantizer.embedding.weight.grad is None


@pytest.mark.parametrize("legacy, to_input, to_codebook", [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_beta_weighs_the_term_that_legacy_says(legacy, to_input, to_codebook):
    quantizer = VectorQuantizer(1, 2, beta=0.25, legacy=legacy)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    code = quantizer.embedding.weight.detach()[0]
    loss = quantizer(z).codebook_loss
    loss.backward()
    difference = z.detach() - code[None, :, None, None]
    torch.testing.assert_close(loss.detach(), 1.25 * difference.square().mean())
    torch.testing.assert_close(z.grad, to_input * 2 * difference / z.numel())
    torch.testing.assert_close(
        quantizer.embedding.weight.grad[0], -to_codebook * 2 * difference.sum((0, 2, 3)) / z.numel()
    )


def test_perplexity_and_codebook_use():
    quantizer = VectorQuantizer(8, 1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.arange(8.0)[:, None])
    even = quantizer(torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 2, 2))
    assert even.perplexity.item() == pytest.approx(4.0) and even.codebook_use.item() == 0.5
    alone = quantizer(torch.zeros(1, 1, 2, 2))
    assert alone.perplexity.item() == pytest.approx(1.0) and alone.codebook_use.item() == 0.125
    skewed = quantizer(torch.tensor([0.0, 0.0, 0.0, 7.0]).view(1, 1, 2, 2))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert skewed.perplexity.item() == pytest.approx(math.exp(entropy))


def test_sane_index_shape():
    quantizer = VectorQuantizer(5, 2, sane_index_shape=True)
    z = torch.randn(2, 2, 3, 4)
    indices = quantizer(z).indices
    assert indices.shape == (2, 3, 4)
    quantizer.sane_index_shape = False
    assert torch.equal(quantizer(z).indices, indices.flatten())


def coded(quantizer, codes):
    """A quantizer whose code i is the number i, and a latent that asks for `codes`."""
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.arange(float(quantizer.n_embed))[:, None])
    return quantizer, torch.tensor(codes, dtype=torch.float32).view(1, 1, 1, -1)


def test_remap_counts_within_the_used_codes(tmp_path):
    np.save(tmp_path / "used.npy", np.array([7, 2, 5]))
    (tmp_path / "used.txt").write_text("7\n2\n5\n")
    for remap in (tmp_path / "used.npy", str(tmp_path / "used.txt"), [7, 2, 5]):
        quantizer, z = coded(VectorQuantizer(10, 1, remap=remap, unknown_index="extra"), [5, 7, 0, 2])
        output = quantizer(z)
        assert output.indices.tolist() == [2, 0, 3, 1]
        assert quantizer.index_count == 4
        assert output.quantized.flatten().tolist() == [5, 7, 0, 2]  # remapping concerns the indices alone
        assert quantizer.embed(output.indices, (1, 1, 4)).flatten().tolist() == [5, 7, 7, 2]
    assert VectorQuantizer(10, 1, remap=[7, 2, 5]).state_dict()["used"].tolist() == [7, 2, 5]


def test_unknown_codes():
    quantizer, z = coded(VectorQuantizer(10, 1, remap=[7, 2, 5], unknown_index=1), [0, 5, 9])
    assert quantizer(z).indices.tolist() == [1, 2, 1]
    quantizer, z = coded(VectorQuantizer(10, 1, remap=[7, 2, 5]), list(range(10)) * 2)
    indices = quantizer(z).indices
    assert torch.equal(indices[:10], indices[10:])  # the same code, the same replacement
    torch.manual_seed(99)
    assert torch.equal(quantizer(z).indices, indices)  # nothing is drawn
    assert indices[[7, 2, 5]].tolist() == [0, 1, 2]
    assert indices.min() >= 0 and indices.max() < 3 and len(indices.unique()) == 3


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: VectorQuantizer(4, 1, remap=[0, 4]), "within 0...3"),
        (lambda: VectorQuantizer(4, 1, remap=[1, 1]), "occurs twice"),
        (lambda: VectorQuantizer(4, 1, remap="nowhere.npy"), "no file at nowhere.npy"),
        (lambda: VectorQuantizer(4, 1, remap=[0, 1], unknown_index=2), "within 0...1, got 2"),
        (lambda: VectorQuantizer(4, 1, remap=[0, 1], unknown_index="any"), "got 'any'"),
        (lambda: VectorQuantizer(4, 2)(torch.zeros(1, 3, 2, 2)), r"latent \(B, 2, H, W\)"),
        (lambda: VectorQuantizer(4, 2).embed(torch.tensor([[[4]]])), "0...3"),
        (lambda: VectorQuantizer(4, 2).embed(torch.tensor([1, 2, 3]), (1, 2, 2)), "do not fit"),
    ],
)
def test_quantizer_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- the discriminator


def test_patch_logits_and_gradients():
    discriminator = NLayerDiscriminator(ndf=8)
    logits = discriminator(images(2, 3, 32, 48))
    assert logits.shape == (2, 1, 2, 4)
    logits.square().mean().backward()
    assert_every_parameter_has_a_gradient(discriminator)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_smallest_image_of_the_discriminator(n_layers):
    discriminator = NLayerDiscriminator(ndf=2, n_layers=n_layers)
    size = 3 * 2**n_layers
    assert discriminator(images(2, 3, size, size)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=f"at least {size}"):
        discriminator(images(2, 3, size - 1, size))


def test_weights_start_small():
    kernels = NLayerDiscriminator().main
    assert kernels[8].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert kernels[9].weight.mean().item() == pytest.approx(1.0, abs=0.01)


def test_actnorm_normalizes_its_first_batch_and_then_stays():
    norm = ActNorm(3)
    x = torch.randn(8, 3, 6, 6) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 4
    y = norm(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(norm(2 * x) - norm(x), norm.scale * x)


def test_actnorm_needs_data_before_evaluation():
    with pytest.raises(RuntimeError, match="not initialized"):
        ActNorm(2).eval()(torch.zeros(1, 2, 3, 3))


def test_actnorm_keeps_what_a_state_dict_says():
    trained = ActNorm(2)
    trained(torch.randn(4, 2, 5, 5) * 3 + 1)
    state = copy.deepcopy(trained.state_dict())
    fresh = ActNorm(2).eval()
    fresh.load_state_dict(state)
    x = torch.randn(4, 2, 5, 5)
    assert torch.equal(fresh(x), trained(x))
    assert torch.equal(fresh.train()(x * 7), trained(x * 7))  # not set anew in training either
    # and one that was ready becomes unready with the state dict of one that never saw data
    fresh.load_state_dict(ActNorm(2).state_dict())
    with pytest.raises(RuntimeError, match="not initialized"):
        fresh.eval()(x)


def test_actnorm_agrees_between_ranks(monkeypatch):
    x = torch.randn(4, 2, 5, 5) * 3 + 1
    other = torch.randn(4, 2, 5, 5) - 2
    both = torch.cat([x, other])

    def add_the_other_rank(moments):
        moments += torch.stack([other.mean((0, 2, 3)), other.square().mean((0, 2, 3))])

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", add_the_other_rank)
    norm = ActNorm(2)
    norm(x)
    torch.testing.assert_close(-norm.loc.flatten(), both.mean((0, 2, 3)))
    torch.testing.assert_close(1 / norm.scale.flatten(), both.std((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_discriminator_with_actnorm_has_biases():
    names = set(NLayerDiscriminator(use_actnorm=True, ndf=4).state_dict())
    assert {"main.2.bias", "main.3.loc", "main.3.scale", "main.3.initialized"} <= names
    assert "main.2.bias" not in NLayerDiscriminator(ndf=4).state_dict()


def test_class_conditional_discriminator():
    discriminator = NLayerDiscriminator(ndf=4, num_classes=10).eval()
    x = images(1, 3, 32, 32).expand(2, -1, -1, -1)
    logits = discriminator(x, torch.tensor([1, 2]))
    assert not torch.equal(logits[0], logits[1])
    logits.sum().backward()
    assert discriminator.class_map.weight.grad[[1, 2]].abs().sum() > 0
    assert not discriminator.class_map.weight.grad[3:].any()
    with pytest.raises(ValueError, match="labels are missing"):
        discriminator(x)
    with pytest.raises(ValueError, match="labels are given"):
        NLayerDiscriminator(ndf=4)(x, torch.tensor([1, 2]))
