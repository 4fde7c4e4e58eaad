"""Published files that do not fit: every difference is listed, nothing is guessed."""

import json
import re

import pytest
import torch
from published_files import averaged_copies, lightning_checkpoint, schedule_buffers, weights_of, write_config
from reference_data import ROOT, load_config

import ldm
from ldm.checkpoints import CheckpointError
from ldm.checkpoints.originals.published import PUBLISHED_HARMLESS
from ldm.checkpoints.strict import KeyMismatch, ignored
from ldm.weights.writing import write_safetensors

FOLDER = "compvis-ldm-class"
CONFIG = str(ROOT / FOLDER / "config.yaml")
UNET = "model.diffusion_model."


def saved(path, state) -> str:
    torch.save({"state_dict": state}, path)
    return str(path)


@pytest.fixture
def state():
    return weights_of(FOLDER) | schedule_buffers()


def test_missing_extra_and_mis_shaped_keys_are_all_listed(state, tmp_path):
    state["first_stage_model.conv_extra.weight"] = torch.ones(2)
    state["cond_stage_model.embedding.weight"] = torch.ones(11, 24)
    del state[UNET + "out.2.bias"]
    with pytest.raises(KeyMismatch) as error:
        ldm.load(saved(tmp_path / "model.ckpt", state), CONFIG)
    found = error.value
    assert found.missing == {UNET + "out.2.bias": (3,)}
    assert found.extra == {"first_stage_model.conv_extra.weight": (2,)}
    assert found.misshaped == {"cond_stage_model.embedding.weight": ((11, 24), (10, 24))}
    for name in (*found.missing, *found.extra, *found.misshaped, "model.ckpt"):
        assert name in str(found)


@pytest.mark.parametrize(
    "folder, name",
    [
        ("compvis-autoencoder-kl", "quant_conv.weight"),
        ("compvis-vq", "quantize.embedding.weight"),
        ("sgm-unet-sdxl", "label_emb.0.0.weight"),
        ("adm-unet-new-order", "input_blocks.1.1.qkv.weight"),
        ("adm-classifier-attention", "out.2.positional_embedding"),
    ],
)
def test_each_kind_of_model_is_strict(folder, name, tmp_path):
    state, config = weights_of(folder), str(ROOT / folder / "config.yaml")
    lacking = {key: value for key, value in state.items() if key != name}
    for wrong, kind in (
        (lacking, "missing"),
        (state | {name + "x": torch.ones(1)}, "extra"),
        (state | {name: state[name][None]}, "misshaped"),
    ):
        with pytest.raises(KeyMismatch) as error:
            ldm.load(saved(tmp_path / "model.pt", wrong), config)
        lists = {part: set(getattr(error.value, part)) for part in ("missing", "extra", "misshaped")}
        assert lists.pop(kind) == {name + "x" if kind == "extra" else name} and not any(lists.values())


def test_other_weights_are_explained(tmp_path):
    """A whole model's file with the config of its network alone."""
    state = {UNET + name: value for name, value in weights_of("sgm-unet-sd2").items()}
    with pytest.raises(KeyMismatch, match=re.escape("behind 'model.diffusion_model.'")):
        ldm.load(saved(tmp_path / "model.ckpt", state), str(ROOT / "sgm-unet-sd2" / "config.yaml"))


def test_averages_of_some_parameters_only(state, tmp_path):
    copies = averaged_copies(state, "model.")
    copies.pop("model_ema.diffusion_modelout2bias")
    path = saved(tmp_path / "model.ckpt", state | copies)
    with pytest.raises(CheckpointError, match=r"1 are missing: model_ema.diffusion_modelout2bias \(of model"):
        ldm.load(path, CONFIG)
    assert ldm.load(path, CONFIG, ema=False).description["weights"] == "raw"


def test_stray_averages_are_extra_keys(state, tmp_path):
    stray = {"model_ema.diffusion_modelout3bias": torch.ones(3)}
    path = saved(tmp_path / "model.ckpt", state | averaged_copies(state, "model.") | stray)
    with pytest.raises(KeyMismatch) as error:
        ldm.load(path, CONFIG)
    assert set(error.value.extra) == set(stray)
    ldm.load(path, CONFIG, ema=False)


def test_without_averages_the_raw_weights_are_taken(state, tmp_path):
    counters = averaged_copies({}, "model.")
    model = ldm.load(saved(tmp_path / "model.ckpt", state | counters), CONFIG)
    assert model.description["weights"] == "raw"
    assert torch.equal(model.network.out[2].bias, state[UNET + "out.2.bias"])


def test_harmless_rules_hide_no_parameter():
    folders = [
        path.name for path in ROOT.iterdir() if path.name.startswith(("compvis", "sgm", "adm", "text"))
    ]
    names = [
        prefix + name
        for folder in folders
        for name in weights_of(folder)
        for prefix in ("", "cond_stage_model.")
    ]
    assert len(names) > 2000 and not any(ignored(name, PUBLISHED_HARMLESS) for name in names)


# The scale of the latents


def scaled(tmp_path, **params) -> str:
    tree = load_config("compvis-ldm-unconditional")
    tree["model"]["params"] |= params
    return write_config(tmp_path / "config.yaml", tree)


def test_scale_by_std_takes_the_scale_from_the_file(tmp_path):
    state = weights_of("compvis-ldm-unconditional")
    config = scaled(tmp_path, scale_by_std=True, scale_factor=1.0)
    with pytest.raises(KeyMismatch) as error:
        ldm.load(saved(tmp_path / "without.ckpt", state), config)
    assert error.value.missing == {"scale_factor": ()}
    path = saved(tmp_path / "with.ckpt", state | {"scale_factor": torch.tensor(0.2277)})
    model = ldm.load(path, config)
    assert model.latent_scale.flatten().tolist() == pytest.approx([0.2277] * 4)
    image = torch.zeros(1, 3, 16, 16)
    assert torch.allclose(model.to_latent(image), model.first_stage_model.moments(image)[0] * 0.2277)


def test_a_scale_that_contradicts_the_config(tmp_path):
    state = weights_of("compvis-ldm-unconditional") | {"scale_factor": torch.tensor(0.2277)}
    path = saved(tmp_path / "model.ckpt", state)
    with pytest.raises(CheckpointError, match="scale_by_std: true"):
        ldm.load(path, scaled(tmp_path, scale_factor=0.18215))
    model = ldm.load(path, scaled(tmp_path, scale_factor=0.2277))
    assert model.latent_scale.flatten()[0].item() == pytest.approx(0.2277)


# Files


def test_every_kind_of_file(tmp_path):
    folder = "compvis-autoencoder-kl"
    weights, config = weights_of(folder), str(ROOT / folder / "config.yaml")
    write_safetensors(tmp_path / "model.safetensors", weights, {"format": "pt"})
    names = sorted(weights)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        write_safetensors(tmp_path / shard, {name: weights[name] for name in part}, {})
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"state_dict": weights}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("model.safetensors", "a.safetensors.index.json", "bare.pth", "old.ckpt"):
        model = ldm.load(tmp_path / name, config)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items()), name


def test_type_and_device(tmp_path):
    folder = "compvis-autoencoder-kl"
    half = {name: value.half() for name, value in weights_of(folder).items()}
    path, config = saved(tmp_path / "model.ckpt", half), str(ROOT / folder / "config.yaml")
    assert ldm.load(path, config).decoder.conv_out.weight.dtype is torch.float32
    model = ldm.load(path, config, dtype=torch.float16, device="cpu")
    assert torch.equal(model.decoder.conv_out.weight, half["decoder.conv_out.weight"])
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_file_is_not_changed_by_training_what_was_loaded(tmp_path):
    folder = "compvis-autoencoder-kl"
    path, config = saved(tmp_path / "model.ckpt", weights_of(folder)), str(ROOT / folder / "config.yaml")
    model = ldm.load(path, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    again = ldm.load(path, config)
    assert torch.equal(again.decoder.conv_out.bias, weights_of(folder)["decoder.conv_out.bias"])


def test_a_published_file_without_its_config(state, tmp_path):
    path = lightning_checkpoint(tmp_path / "model.ckpt", state)
    (tmp_path / "project.yaml").write_text("model: {}")
    with pytest.raises(CheckpointError, match="needs that project's config: config='.*project.yaml'"):
        ldm.load(path)
    write_safetensors(tmp_path / "model.safetensors", state, {})
    with pytest.raises(CheckpointError, match="no description of their model.*needs that project's config"):
        ldm.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        ldm.load(tmp_path / "absent.ckpt", CONFIG)


def test_a_config_of_this_toolkit(tmp_path):
    """A native YAML, whole or bare, for weights without a description."""
    weights = weights_of("adm-unet-new-order")
    params = {
        name: value
        for name, value in load_config("adm-unet-new-order")["params"].items()
        if name != "image_size"
    }
    bare = {"target": "ldm.models.unet.UNetModel", "params": params}
    path = saved(tmp_path / "model.pt", weights)
    for tree in (bare, {"model": bare, "training": {"steps": 3}}):
        model = ldm.load(path, write_config(tmp_path / "config.yaml", tree))
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
