"""The conditions of published models: text encoders against other implementations, maps, vectors."""

import sys

import pytest
import torch
import torch.nn.functional as F
from published_files import weights_of
from reference_data import load_cases, load_config, load_keys, relative_error

import ldm
from ldm.checkpoints.strict import KeyMismatch
from ldm.conditioning import Conditioner
from ldm.conditioning.bert import BERTEmbedder
from ldm.conditioning.clip import CLIPTextEmbedder
from ldm.conditioning.maps import EncodedImage, ImageMap, Mask, SpatialRescaler
from ldm.conditioning.open_clip import OpenCLIPTextEmbedder
from ldm.conditioning.vectors import ClassFeatures, Features, Labels, SinusoidalNumbers

TOLERANCE = 1e-5


def filled(kind, folder, **options):
    """An embedder of the reference's sizes with its weights; names and shapes are exactly the reference's."""
    embedder = kind(**load_config(folder)["params"], **options)
    shapes = {name: list(parameter.shape) for name, parameter in embedder.named_parameters()}
    assert shapes == load_keys(folder)
    embedder.load_state_dict(weights_of(folder))
    return embedder.eval(), load_cases(folder)


# Text


@pytest.mark.parametrize(
    "layer, index, expected",
    [("last", None, "last"), *(("hidden", i, f"hidden_{i % 4}") for i in range(-4, 4))],
)
def test_clip(layer, index, expected):
    for pooled in (False, True):
        embedder, cases = filled(CLIPTextEmbedder, "text-clip", layer=layer, layer_index=index, pooled=pooled)
        with torch.no_grad():
            outputs = embedder.embed(cases["tokens"], None)
        assert relative_error(outputs["crossattn"], cases[expected]) < TOLERANCE
        assert set(outputs) == {"crossattn", "vector"} if pooled else {"crossattn"}
        if pooled:
            assert relative_error(outputs["vector"], cases["pooled"]) < TOLERANCE


def test_clip_pooled_layer():
    embedder, cases = filled(CLIPTextEmbedder, "text-clip", layer="pooled")
    with torch.no_grad():
        assert (
            relative_error(embedder.embed(cases["tokens"], None)["crossattn"], cases["pooled"][:, None])
            < TOLERANCE
        )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"layer": "penultimate", "normed": True}, "penultimate_normed"),
        ({"layer": "penultimate", "normed": False, "pooled": True}, "penultimate"),
        ({"layer": "last", "normed": True, "pooled": True}, "last_normed"),
    ],
)
def test_open_clip(options, expected):
    embedder, cases = filled(OpenCLIPTextEmbedder, "text-open-clip", **options)
    with torch.no_grad():
        outputs = embedder.embed(cases["tokens"], None)
    assert relative_error(outputs["crossattn"], cases[expected]) < TOLERANCE
    if options.get("pooled"):
        assert relative_error(outputs["vector"], cases["projected"]) < TOLERANCE


def test_bert():
    embedder, cases = filled(BERTEmbedder, "text-bert")
    with torch.no_grad():
        features = embedder.embed(cases["tokens"], None)["crossattn"]
        short = embedder.embed(cases["tokens"][:, :5], None)["crossattn"]
    assert relative_error(features, cases["features"]) < TOLERANCE
    assert relative_error(short, cases["features_of_5"]) < TOLERANCE


@pytest.mark.parametrize(
    "kind, sizes, start",
    [
        (CLIPTextEmbedder, {"width": 8, "layers": 1, "heads": 2}, [49406, 49407, 49407]),
        (OpenCLIPTextEmbedder, {"width": 8, "layers": 2, "heads": 2, "embed_dim": 4}, [49406, 49407, 0]),
        (BERTEmbedder, {"dim": 8, "depth": 1}, [101, 102, 0]),
    ],
)
def test_absent_texts(kind, sizes, start):
    torch.manual_seed(0)
    embedder = kind(key="txt", drop=0.5, **sizes).eval()
    empty = embedder.empty_tokens()
    assert empty[:3].tolist() == start and len(empty) == 77
    tokens = torch.randint(1, 1000, (2, 77))
    conditioner = Conditioner([embedder])
    with torch.no_grad():
        whole = conditioner({"txt": tokens})["crossattn"]
        dropped = conditioner({"txt": tokens}, u=torch.tensor([[0.1, 0.9]]))["crossattn"]
        absent = conditioner.unconditional(2)["crossattn"]
        again = conditioner({"txt": empty.expand(2, -1)})["crossattn"]
    assert torch.equal(absent, again) and torch.equal(dropped[1], whole[1])
    assert torch.allclose(dropped[0], absent[0], atol=1e-6) and not torch.allclose(
        dropped[0], whole[0], atol=1e-3
    )
    zeros = Conditioner([kind(key="txt", absent="zeros", **sizes)])
    assert not zeros.unconditional(2)["crossattn"].any()


def test_every_parameter_of_a_text_encoder_receives_a_gradient():
    torch.manual_seed(0)
    tokens = torch.randint(0, 90, (2, 12))
    sizes = {"vocab_size": 100, "max_length": 12}
    clip = {"width": 8, "layers": 2, "heads": 2, "pooled": True, **sizes}
    for embedder in (
        CLIPTextEmbedder(**clip),
        OpenCLIPTextEmbedder(embed_dim=4, **clip),
        BERTEmbedder(8, 2, **sizes),
    ):
        outputs = embedder.embed(tokens, None)
        sum(value.square().mean() + value.mean() for value in outputs.values()).backward()
        frozen = {name for name, p in embedder.named_parameters() if not p.requires_grad}
        assert all("logit" in name for name in frozen)
        without = [n for n, p in embedder.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, without


def test_texts_need_a_tokenizer_only_when_there_are_texts(monkeypatch):
    embedder = CLIPTextEmbedder(width=8, layers=1, heads=2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-toolkit\[text\]'"):
        embedder.embed(["a cat"], None)
    embedder.tokenizer = lambda texts: torch.full((len(texts), 77), 7)
    assert embedder.embed(["a cat", "a dog"], None)["crossattn"].shape == (2, 77, 8)
    assert embedder.embed("a cat", None)["crossattn"].shape == (1, 77, 8)
    for wrong in (
        torch.zeros(2, 78, dtype=torch.int64),
        torch.zeros(2, 77),
        torch.zeros(77, dtype=torch.int64),
        [3],
    ):
        with pytest.raises(ValueError, match="token"):
            embedder.embed(wrong, None)


def test_tokens_without_an_empty_text():
    boxes = BERTEmbedder(8, 1, key="boxes", vocab_size=20, max_length=6, texts=False)
    with pytest.raises(ValueError, match="explicit `uncond`"):
        Conditioner([boxes]).unconditional(1)
    with pytest.raises(ValueError, match="token numbers"):
        boxes.embed(["text"], None)


# Vectors


def test_sizes_are_embedded_as_timesteps():
    embedder = SinusoidalNumbers("size", dim=4)
    out = embedder.embed(torch.tensor([[1024.0, 512.0], [0.0, 1.0]]), None)
    assert out.shape == (2, 8)
    w = torch.tensor([1.0, 0.01])
    assert torch.allclose(out[0, :4], torch.cat([(1024 * w).cos(), (1024 * w).sin()]), atol=1e-5)
    assert torch.allclose(out[1, 4:], torch.cat([w.cos(), w.sin()]))
    assert torch.equal(embedder.embed(torch.tensor([3.0]), None), embedder.embed(torch.tensor([[3.0]]), None))
    assert not embedder.embed(torch.ones(1, 2), torch.tensor([True])).any()


def test_classes():
    table = ClassFeatures(5, 3, "vector", absent="zeros", key="label", also=("cls",), drop=0.2)
    conditioner = Conditioner([table])
    labels = torch.tensor([1, 4])
    assert torch.equal(conditioner({"cls": labels})["vector"], table.embedding.weight[labels])
    assert not conditioner.unconditional(2)["vector"].any()
    unknown = Conditioner([ClassFeatures(5, 3)])
    assert unknown({"label": labels})["crossattn"].shape == (2, 1, 3)
    with pytest.raises(ValueError, match="no absent class is known"):
        unknown.unconditional(2)
    with pytest.raises(ValueError, match="'label', but the batch has only other"):
        unknown({"other": labels})
    with pytest.raises(ValueError, match="absent='zeros'"):
        ClassFeatures(5, 3, drop=0.1)
    with pytest.raises(ValueError, match="without a classifier"):
        Conditioner([Labels(5)]).unconditional(2)


def test_ready_made_features():
    conditioner = Conditioner([Features("nix")])
    assert conditioner({"nix": torch.ones(2, 7)})["crossattn"].shape == (2, 1, 7)
    assert conditioner({"nix": torch.ones(2, 3, 7)})["crossattn"].shape == (2, 3, 7)
    with pytest.raises(ValueError, match=r"tokens \(B, N, D\)"):
        conditioner({"nix": torch.ones(2)})


def test_two_text_encoders_and_sizes_join_as_in_sdxl():
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "max_length": 12, "layers": 2, "heads": 2}
    first = CLIPTextEmbedder(layer="hidden", layer_index=1, width=8, absent="zeros", **sizes)
    second = OpenCLIPTextEmbedder(normed=False, pooled=True, width=6, embed_dim=4, absent="zeros", **sizes)
    numbers = SinusoidalNumbers("size", dim=2)
    conditioner = Conditioner([first, second, numbers], crossattn_merge="channels").eval()
    batch = {"txt": torch.randint(0, 90, (3, 12)), "size": torch.rand(3, 2)}
    with torch.no_grad():
        cond = conditioner(batch)
        uncond = conditioner.without(batch, ["txt"])
        two = second.encode(batch["txt"])
        expected = torch.cat([first.encode(batch["txt"])["crossattn"], two["crossattn"]], dim=2)
    assert torch.equal(cond["crossattn"], expected) and expected.shape == (3, 12, 14)
    assert torch.equal(cond["vector"], torch.cat([two["vector"], numbers.embed(batch["size"], None)], dim=1))
    assert not uncond["crossattn"].any() and not uncond["vector"][:, :4].any()
    assert torch.equal(uncond["vector"][:, 4:], cond["vector"][:, 4:])
    with pytest.raises(ValueError, match="without"):
        conditioner.unconditional(3)
    with pytest.raises(ValueError, match="key is 'text', must be one of txt"):
        conditioner.without(batch, ["text"])


# Maps


def test_spatial_rescaler():
    torch.manual_seed(0)
    rescaler = SpatialRescaler("map", stages=2, in_channels=5, out_channels=3)
    assert {n: tuple(p.shape) for n, p in rescaler.named_parameters()} == {
        "channel_mapper.weight": (3, 5, 1, 1)
    }
    x = torch.rand(2, 5, 16, 24)
    half = F.interpolate(
        F.interpolate(x, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear"
    )
    expected = torch.einsum("oc,bchw->bohw", rescaler.channel_mapper.weight[:, :, 0, 0], half)
    assert torch.allclose(rescaler.embed(x, None), expected, atol=1e-6)
    assert torch.equal(SpatialRescaler("map", stages=2).embed(x, None), half)
    with pytest.raises(ValueError, match="method"):
        SpatialRescaler("map", method="linaer")
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        rescaler.embed(x[0], None)


def test_low_resolution_images():
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(ImageMap("low_res").embed(x, None), x)
    expected = F.interpolate(x, (8, 8), mode="bilinear")
    assert torch.equal(ImageMap("low_res", size=8).embed(x, None), expected)


def inpainting_config(target, unet, **params) -> dict:
    tree = load_config("compvis-ldm-class")
    changed = tree["model"]["params"]
    for name in ("context_dim", "use_spatial_transformer", "transformer_depth"):
        if name not in unet:
            del changed["unet_config"]["params"][name]
    changed["unet_config"]["params"] |= {name: value for name, value in unet.items() if value is not None}
    changed |= params
    tree["model"]["target"] = "ldm.models.diffusion.ddpm." + target
    return tree


def unfilled_state(config) -> dict[str, torch.Tensor]:
    from ldm.checkpoints.originals.original_yaml import read_original
    from ldm.checkpoints.originals.published import build_empty, translate

    translated = translate(read_original(config))
    view = translated.view(build_empty(translated))
    generator = torch.Generator().manual_seed(0)
    tied = {}
    return {
        name: tied.setdefault(id(value), 0.1 * torch.randn(value.shape, generator=generator))
        for name, value in view.state_dict(keep_vars=True).items()
    }


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    """The original's inpainting model: the first stage is the condition's model too, under a second name."""
    config = inpainting_config(
        "LatentDiffusion",
        {"in_channels": 7},
        conditioning_key=None,
        concat_mode=True,
        cond_stage_trainable=False,
        cond_stage_key="masked_image",
        cond_stage_config="__is_first_stage__",
        scale_factor=0.5,
    )
    state = unfilled_state(config)
    path = tmp_path_factory.mktemp("inpainting") / "model.ckpt"
    torch.save({"state_dict": state}, path)
    return config, state, path, ldm.load(path, config)


def test_inpainting(inpainting):
    _, _, _, model = inpainting
    assert [type(embedder) for embedder in model.conditioner.embedders] == [EncodedImage, Mask]
    batch = {"masked_image": torch.rand(2, 3, 16, 16), "mask": torch.rand(2, 1, 16, 16)}
    with torch.no_grad():
        cond = model.conditioner(batch)
        latent = model.first_stage_model.encode_to_prequant(batch["masked_image"])  # not scaled
        assert torch.equal(cond["concat"], torch.cat([latent, batch["mask"][:, :, ::2, ::2]], dim=1))
        z = ldm.sample(model, cond=cond, sampler="ddim", steps=4)
    assert z.shape == (2, 3, 8, 8)
    assert "conditioner" not in "".join(model.state_dict())  # the first stage is there once only


def test_the_conditions_copy_of_the_first_stage_is_held_against_it(inpainting, tmp_path):
    config, state, _, model = inpainting
    names = [name for name in state if name.startswith("cond_stage_model.")]
    assert len(names) > 100
    pruned = {name: value for name, value in state.items() if name not in names}
    torch.save(pruned, tmp_path / "pruned.ckpt")
    again = ldm.load(tmp_path / "pruned.ckpt", config)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    loss = {"cond_stage_model.loss.logvar": torch.zeros(())}
    torch.save(state | {names[0]: state[names[0]] + 1} | loss, tmp_path / "other.ckpt")
    with pytest.raises(KeyMismatch) as error:
        ldm.load(tmp_path / "other.ckpt", config)
    assert names[0] in error.value.contradictory[0] and not error.value.extra


def test_inpainting_of_stable_diffusion():
    cond = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 24, "n_classes": 4},
    }
    config = inpainting_config(
        "LatentInpaintDiffusion",
        {"in_channels": 7, "context_dim": 24, "use_spatial_transformer": True, "transformer_depth": 1},
        conditioning_key="hybrid",
        cond_stage_config=cond,
        finetune_keys=None,
        scale_factor=0.5,
    )
    from ldm.checkpoints.originals.original_yaml import read_original
    from ldm.checkpoints.originals.published import build_empty, fill, translate
    from ldm.weights.reading import Weights

    translated = translate(read_original(config))
    model = build_empty(translated)
    fill(model, translated, Weights(unfilled_state(config)), True, "here")
    batch = {
        "masked_image": torch.rand(2, 3, 16, 16),
        "mask": (torch.rand(2, 1, 16, 16) > 0.5).float(),
        "class_label": torch.tensor([1, 3]),
    }
    with torch.no_grad():
        out = model.conditioner(batch)
        latent = model.to_latent(batch["masked_image"])  # scaled
    assert torch.equal(out["concat"], torch.cat([batch["mask"][:, :, ::2, ::2], latent], dim=1))
    assert out["crossattn"].shape == (2, 1, 24)


def test_maps_that_need_a_first_stage_say_so():
    with pytest.raises(ValueError, match="part of a LatentDiffusion"):
        EncodedImage().embed(torch.rand(1, 3, 8, 8), None)
