import importlib
import json

import pytest
import torch
from reference_data import ROOT, filled_state_dict, load_cases, load_config, load_keys, noise, relative_error

from ldm.models.vit import VIT_SIZES, DropPath, VisionTransformer, fit_positions, linear_decay

TINY = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5)


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return VisionTransformer(**{**TINY, **options})


@pytest.mark.parametrize(("folder", "distilled"), [("timm-vit", False), ("timm-deit-distilled", True)])
def test_equals_timm(folder, distilled):
    keys, cases = load_keys(folder), load_cases(folder)
    model = VisionTransformer(**load_config(folder)["params"], distilled=distilled).eval()
    assert shapes(model) == keys
    model.load_state_dict(filled_state_dict(keys))
    features = model.forward_features(cases["x"])
    assert relative_error(features, cases["features"]) < 1e-5
    assert relative_error(model(cases["x"]), cases["logits"]) < 1e-5
    if distilled:
        heads = model.forward_heads(features)
        assert len(heads) == 2
        assert torch.allclose(model(cases["x"]), (heads[0] + heads[1]) / 2)
        assert not torch.allclose(heads[0], heads[1])


@pytest.mark.parametrize("path", sorted((ROOT / "timm-keys").glob("*.json")), ids=lambda path: path.stem)
def test_published_names_and_shapes(path):
    keys = json.loads(path.read_text())
    with torch.device("meta"):
        model = VisionTransformer(path.stem, **({} if "head.weight" in keys else {"num_classes": 0}))
    assert shapes(model) == keys


@pytest.mark.parametrize("size", VIT_SIZES)
def test_heads_of_the_sizes(size):
    with torch.device("meta"):
        model = VisionTransformer(size)
    names, width = shapes(model), model.embed_dim
    assert names["head.weight"] == [21843 if size.endswith("in21k") else 1000, width]
    assert ("pre_logits.fc.weight" in names) == size.endswith("in21k")
    assert names.get("pre_logits.fc.weight", [width, width]) == [width, width]


@pytest.mark.parametrize(
    ("size", "parameters"),  # Dosovitskiy et al. 2020, table 1: 86 M, 307 M, 632 M
    [("vit_base_patch16_224", 86_567_656), ("vit_large_patch16_224", 304_326_632)],
)
def test_numbers_of_parameters(size, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in VisionTransformer(size).parameters()) == parameters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distilled": True},
        {"representation_size": 7},
        {"num_classes": 0},
        {"img_size": (8, 12), "patch_size": (4, 2), "in_chans": 1},
        {"qkv_bias": False, "drop_path_rate": 0.3, "drop_rate": 0.1, "attn_drop_rate": 0.1},
    ],
)
def test_every_parameter_receives_a_gradient(options):
    model = tiny(**options)
    size = model.patch_embed.image_size
    model(torch.randn(64, options.get("in_chans", 3), *size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_nothing():
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint, drop_path_rate=0.5, drop_rate=0.2)
        torch.manual_seed(1)
        model(torch.randn(8, 3, 8, 8)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_representation_layer_is_a_tanh_layer():
    model = tiny(representation_size=7, num_classes=0).eval()
    x = torch.randn(2, 3, 8, 8)
    token = model.forward_features(x)[:, 0]
    layer = model.pre_logits.fc
    assert torch.allclose(model(x), torch.tanh(token @ layer.weight.T + layer.bias), atol=1e-6)


def test_without_classes_the_class_token_comes_out():
    model, x = tiny(num_classes=0).eval(), torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), model.forward_features(x)[:, 0])
    assert model.forward_features(x).shape == (2, 1 + 4, 12)


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25)
    out = layer(torch.ones(20_000, 2, 3))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert per_sample.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer.eval()(out), out)
    half = DropPath(0.5)(torch.ones(4, 2, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_drop_path_decays_linearly():
    assert linear_decay(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert linear_decay(0.3, 1) == [0.0]
    model = tiny(depth=3, drop_path_rate=0.4)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])


def test_dynamic_size_interpolates_positions():
    fixed, dynamic = tiny().eval(), tiny(dynamic_img_size=True).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fixed(x), dynamic(x))
    assert dynamic.forward_features(torch.randn(2, 3, 12, 20)).shape == (2, 1 + 15, 12)
    with pytest.raises(ValueError, match="12x20.* built for 8x8"):
        fixed(torch.randn(2, 3, 12, 20))
    with pytest.raises(ValueError, match="10x8 .* patches of 4x4"):
        dynamic(torch.randn(2, 3, 10, 8))


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_of_another_size_load_after_fitting(distilled):
    small, large = tiny(distilled=distilled), tiny(seed=1, img_size=(12, 16), distilled=distilled)
    with pytest.raises(RuntimeError, match="pos_embed"):
        large.load_state_dict(small.state_dict())
    large.load_state_dict(fit_positions(small.state_dict(), large))
    dynamic = tiny(seed=2, dynamic_img_size=True, distilled=distilled)
    dynamic.load_state_dict(small.state_dict())
    x = torch.randn(2, 3, 12, 16)
    assert torch.allclose(large.eval()(x), dynamic.eval()(x), atol=1e-6)
    back = fit_positions(large.state_dict(), small, grid=(3, 4))["pos_embed"]
    assert back.shape == small.pos_embed.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionTransformer("vit_small"), "size is 'vit_small', must be one of vit_base"),
        (lambda: VisionTransformer(img_size=8, depth=2), "patch_size, embed_dim, num_heads, num_classes"),
        (lambda: tiny(img_size=10), "10x10"),
        (lambda: tiny(num_heads=5), "heads=5"),
        (lambda: tiny(distilled=True, representation_size=4), "exclude each"),
        (lambda: DropPath(1.0), "rate=1.0"),
        (lambda: fit_positions({}, tiny()), "no 'pos_embed'"),
        (lambda: fit_positions({"pos_embed": torch.zeros(1, 7, 12)}, tiny()), "6 patches are no square"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def import_timm():
    try:
        return importlib.import_module("timm")
    except Exception as error:  # a torchvision that does not fit this torch raises more than ImportError
        pytest.skip(f"timm cannot be imported: {error}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {"distilled": True}),
        ("vit_base_patch16_224", {"dynamic_img_size": True}),
    ],
)
def test_equals_timm_as_installed(name, options):
    timm = import_timm()
    extra = {key: value for key, value in options.items() if key != "distilled"}
    theirs = timm.create_model(name, **TINY, **extra).eval()
    ours = tiny(**options).eval()
    ours.load_state_dict(theirs.state_dict())
    size = (12, 20) if "dynamic_img_size" in options else (8, 8)
    x = noise("vit.x", 2, 3, *size)
    with torch.no_grad():
        assert relative_error(ours.forward_features(x), theirs.forward_features(x)) < 1e-5
        assert relative_error(ours(x), theirs(x)) < 1e-5
