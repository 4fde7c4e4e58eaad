"""OpenAI's classifier and super-resolution network, sgm's first stage, and OpenAI's flags."""

import pytest
import torch
import torch.nn.functional as F
from published_files import weights_of
from reference_data import load_cases, load_config, relative_error

import ldm
from ldm.checkpoints.originals.original_yaml import read_original
from ldm.checkpoints.originals.published import build_empty, translate
from ldm.config import ConfigError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoding_engine import AutoencodingEngine
from ldm.models.encoder_unet import POOLS, EncoderUNetModel, SuperResModel
from ldm.models.unet import UNetModel

SMALL = {
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 32,
}


def randomized(module):
    """No layer at zero, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def classifier(pool, **options) -> EncoderUNetModel:
    return randomized(EncoderUNetModel(image_size=16, out_channels=10, pool=pool, **(SMALL | options)))


HEADS = {
    # widths of the blocks' outputs: 32 (first convolution), 32, 32 (down), 64, and 64 of the middle
    "adaptive": {
        "out.0.weight": (64,),
        "out.0.bias": (64,),
        "out.3.weight": (10, 64, 1, 1),
        "out.3.bias": (10,),
    },
    "attention": {
        "out.0.weight": (64,),
        "out.0.bias": (64,),
        "out.2.positional_embedding": (64, 65),
        "out.2.qkv_proj.weight": (192, 64, 1),
        "out.2.qkv_proj.bias": (192,),
        "out.2.c_proj.weight": (10, 64, 1),
        "out.2.c_proj.bias": (10,),
    },
    "spatial": {
        "out.0.weight": (2048, 224),
        "out.0.bias": (2048,),
        "out.2.weight": (10, 2048),
        "out.2.bias": (10,),
    },
    "spatial_v2": {
        "out.0.weight": (2048, 224),
        "out.0.bias": (2048,),
        "out.1.weight": (2048,),
        "out.1.bias": (2048,),
        "out.3.weight": (10, 2048),
        "out.3.bias": (10,),
    },
}


@pytest.mark.parametrize("pool", POOLS)
def test_classifier_heads(pool):
    model = classifier(pool)
    head = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("out.")}
    assert head == HEADS[pool]
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    logits = model(x, t)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    if pool != "attention":  # the others take any size
        assert model(torch.randn(1, 3, 32, 16), t[:1]).shape == (1, 10)


def test_spatial_pools_by_hand():
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    for pool in ("spatial", "spatial_v2"):
        model = classifier(pool).eval()
        features, h = [], x
        emb = model.embed(t, None)
        for block in (*model.input_blocks, model.middle_block):
            h = block(h, emb)
            features.append(h.flatten(2).mean(-1))
        h = F.linear(torch.cat(features, 1), model.out[0].weight, model.out[0].bias)
        h = (
            h.relu()
            if pool == "spatial"
            else F.silu(F.group_norm(h, 32, model.out[1].weight, model.out[1].bias))
        )
        assert torch.allclose(model(x, t), model.out[-1](h), atol=1e-5)


def test_adaptive_pool_by_hand():
    model = classifier("adaptive").eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    h, _ = model.encode(x, model.embed(t, None), None)
    h = F.silu(F.group_norm(h, 32, model.out[0].weight, model.out[0].bias)).mean((2, 3))
    assert torch.allclose(model(x, t), h @ model.out[3].weight[:, :, 0, 0].T + model.out[3].bias, atol=1e-5)


def test_classifier_errors():
    with pytest.raises(ValueError, match="pool is 'mean', must be one of"):
        classifier("mean")
    with pytest.raises(ValueError, match="needs num_head_channels"):
        classifier("attention", num_head_channels=-1, num_heads=2)
    with pytest.raises(ValueError, match="images of its image_size only"):
        classifier("attention")(torch.randn(1, 3, 32, 32), torch.tensor([1]))


def test_classifier_checkpoints_exactly():
    plain, saving = classifier("attention"), classifier("attention", use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    for model in (plain, saving):
        model(x, t).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_super_resolution():
    model = randomized(SuperResModel(out_channels=3, num_classes=4, **SMALL)).eval()
    x, low = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4)
    t, y = torch.tensor([3, 700]), torch.tensor([0, 3])
    assert tuple(model.input_blocks[0][0].weight.shape) == (32, 6, 3, 3)
    joint = torch.cat([x, F.interpolate(low, (16, 16), mode="bilinear")], dim=1)
    with torch.no_grad():
        assert torch.equal(model(x, t, low, y), UNetModel.forward(model, joint, t, y=y))


def test_super_resolution_is_loaded_both_ways(tmp_path):
    network = randomized(SuperResModel(out_channels=6, num_classes=4, **SMALL)).eval()
    torch.save(network.state_dict(), tmp_path / "upsampler.pt")
    params = SMALL | {"out_channels": 6, "num_classes": 4, "image_size": 16}
    bare = {"target": "guided_diffusion.unet.SuperResModel", "params": params}
    x, low = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4)
    t, y = torch.tensor([3, 700]), torch.tensor([0, 3])
    with torch.no_grad():
        expected = network(x, t, low, y)
        assert torch.equal(ldm.load(tmp_path / "upsampler.pt", bare)(x, t, low, y), expected)
        whole = ldm.load(tmp_path / "upsampler.pt", bare | {"diffusion": {"learn_sigma": True}})
        cond = whole.conditioner({"low_res": low, "y": y})
        assert torch.equal(whole.predict(x, t, cond), expected)
        assert ldm.sample(whole, cond=cond, sampler="ddpm", steps=3).abs().max() <= 1.5


# sgm's first stage without convolutions around the latent


def engine(regularizer="kl", **options):
    dd = load_config("compvis-autoencoder-kl")["model"]["params"]["ddconfig"] | {
        "double_z": regularizer == "kl"
    }
    return AutoencodingEngine(dd, dd, regularizer, **options)


def test_engine_is_the_autoencoder_with_identities_around_the_latent():
    weights = weights_of("compvis-autoencoder-kl")
    reference = AutoencoderKL(load_config("compvis-autoencoder-kl")["model"]["params"]["ddconfig"], 4)
    eye = {"quant_conv": torch.eye(8), "post_quant_conv": torch.eye(4)}
    for name, matrix in eye.items():
        weights |= {f"{name}.weight": matrix[:, :, None, None], f"{name}.bias": torch.zeros(len(matrix))}
    reference.load_state_dict(weights)
    model = engine()
    model.load_state_dict({name: value for name, value in weights.items() if "quant_conv" not in name})
    image = load_cases("compvis-autoencoder-kl")["image"]
    noise = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        ours, theirs = model(image, noise), reference(image, noise)
        assert relative_error(ours[0], theirs[0]) < 1e-5
        assert relative_error(ours[1].parameters, theirs[1].parameters) < 1e-5
        assert all(
            relative_error(a, b) < 1e-5
            for a, b in zip(model.moments(image), reference.moments(image), strict=True)
        )
        assert torch.equal(model.decode_latent(noise), model.decode(noise))
    assert (model.latent_channels, model.downsampling_factor, model.image_channels) == (4, 4, 3)
    assert model.last_layer is model.decoder.conv_out.weight


def test_engine_with_a_codebook_or_nothing():
    image = torch.rand(1, 3, 32, 32)
    vq = engine("vq", n_embed=16)
    with torch.no_grad():
        output = vq.encode(image)
        assert torch.equal(vq.decode_latent(vq.encode_to_prequant(image)), vq(image)[0])
        assert (
            torch.equal(vq.moments(image)[0], vq.encode_to_prequant(image)) and not vq.moments(image)[1].any()
        )
        plain = engine("none")
        assert plain.encode(image).shape == (1, 4, 8, 8) and plain(image)[1] is None
    assert output.quantized.shape == (1, 4, 8, 8) and not vq.quantize.legacy
    for wrong in (
        lambda: engine("kl", n_embed=3),
        lambda: engine("vq"),
        lambda: engine("vae"),
        lambda: AutoencodingEngine({"double_z": False, "z_channels": 4}, {"z_channels": 4}, "kl"),
    ):
        with pytest.raises(ValueError, match="AutoencodingEngine"):
            wrong()


# OpenAI's flags: what its README gives for the published models


def from_flags(function, **flags):
    project = "improved_diffusion" if flags.pop("improved", False) else "guided_diffusion"
    translated = translate(read_original({"target": f"{project}.script_util.{function}", "params": flags}))
    return build_empty(translated)


GUIDED = {"learn_sigma": True, "use_fp16": True, "use_scale_shift_norm": True, "resblock_updown": True}


@pytest.mark.parametrize(
    "flags, millions",
    [
        # guided-diffusion's 64, 128, 256 and 512; Dhariwal & Nichol 2021, table 4: 296, 422, 554, 559 M
        ({"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64}, "295.9"),
        ({"image_size": 128, "num_channels": 256, "num_heads": 4}, "421.5"),
        ({"image_size": 256, "num_channels": 256, "num_head_channels": 64}, "553.8"),
        ({"image_size": 512, "num_channels": 256, "num_head_channels": 64}, "559.0"),
    ],
)
def test_published_flags(flags, millions):
    attention = {"attention_resolutions": "32,16,8", "class_cond": True, "diffusion_steps": 1000}
    model = from_flags("create_model_and_diffusion", **(GUIDED | attention | flags), noise_schedule="linear")
    assert f"{sum(p.numel() for p in model.network.parameters()) / 1e6:.1f}" == millions
    assert model.denoiser.learned_variance and model.latent_shape == (
        3,
        flags["image_size"],
        flags["image_size"],
    )
    assert model.conditioner.embedders[0].num_classes == 1000
    assert model.denoiser.schedule.betas[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2])


def test_improved_diffusions_flags():
    flags = {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 3,
        "diffusion_steps": 4000,
        "improved": True,
    }
    model = from_flags(
        "create_model_and_diffusion", **flags, noise_schedule="cosine", rescale_timesteps=False
    )
    assert model.denoiser.schedule.timesteps == 4000 and not model.denoiser.learned_variance
    with pytest.raises(ConfigError, match="rescale_timesteps"):  # its default is True
        from_flags("create_model_and_diffusion", **flags)


def test_classifier_and_upsampler_flags():
    model = from_flags("create_classifier", image_size=256, classifier_width=128, classifier_depth=2)
    assert (
        isinstance(model, EncoderUNetModel) and round(sum(p.numel() for p in model.parameters()) / 1e6) == 54
    )
    model = from_flags(
        "sr_create_model_and_diffusion",
        large_size=256,
        small_size=64,
        num_channels=192,
        num_heads=4,
        attention_resolutions="32,16,8",
        class_cond=True,
        **GUIDED,
    )
    assert model.network.in_channels == 6 and [e.key for e in model.conditioner.embedders] == [
        "label",
        "low_res",
    ]


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"params": {"image_size": 100}}, "100 has no channel_mult"),
        ({"params": {"image_sise": 64}}, "image_sise: unknown; did you mean image_size"),
        ({"params": {"noise_schedule": "sqrt"}}, "none of linear, cosine"),
        ({"target": "guided_diffusion.unet.EncoderUNetModel", "diffusion": {}}, "does not go with"),
        (
            {"target": "guided_diffusion.unet.UNetModel", "diffusion": {"learnsigma": True}},
            "learnsigma: unknown",
        ),
    ],
)
def test_flags_that_are_wrong(tree, words):
    tree = {"target": "guided_diffusion.script_util.create_model_and_diffusion"} | tree
    if "unet" in tree["target"]:
        tree["params"] = SMALL | {"out_channels": 3, "image_size": 16}
    with pytest.raises(ConfigError, match=words):
        translate(read_original(tree))
