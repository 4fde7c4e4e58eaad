"""What a user hands to `ldm.load`, right and wrong: folders, types, sizes, and files that mean harm."""

import copy
import json
import os
import pickle
import zipfile

import pytest
import torch
from diffusers_models import KL, build, conditioner, description, discrete, network, part, randomized
from published_configs import STABLE_DIFFUSION
from published_files import averaged_copies, lightning_checkpoint, schedule_buffers, weights_of, write_config
from reference_data import load_config

import ldm
from ldm.checkpoints import CheckpointError, native
from ldm.checkpoints.convert import convert
from ldm.checkpoints.diffusers.export import save_diffusers
from ldm.checkpoints.strict import KeyMismatch
from ldm.config import ConfigError
from ldm.weights.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from ldm.weights.writing import write_safetensors

FOLDER = "compvis-ldm-class"


@pytest.fixture
def state():
    return weights_of(FOLDER) | schedule_buffers()


def changed(change) -> dict:
    tree = load_config(FOLDER)
    change(tree["model"]["params"])
    return tree


# Files that mean harm


class Runs:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def written(path, content, form):
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_is_refused_by_every_road(form, tmp_path):
    sentinel = tmp_path / "touched"
    bad = {"state_dict": {"w": 1.0, "x": Runs(sentinel)}}
    roads = [
        (written(tmp_path / f"model{suffix}", bad, form), config)
        for suffix in (".ckpt", ".pt", ".pth", ".bin")
        for config in (None, load_config(FOLDER))
    ]
    run = written(tmp_path / "run" / "checkpoints" / "step-00000001.ckpt", {"format": Runs(sentinel)}, form)
    original = written(tmp_path / "logs" / "checkpoints" / "last.ckpt", bad, form)
    roads += [(run, None), (run.parent.parent, None), (original.parent.parent, load_config(FOLDER))]
    save_diffusers(build("vq-unconditional"), tmp_path / "folder")
    (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    written(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.bin", bad, form)
    roads += [(tmp_path / "folder", None), (tmp_path / "folder" / "unet", None)]
    for path, config in roads:
        with pytest.raises(UnsafeCheckpoint, match="system"):
            ldm.load(path, config)
    (tmp_path / "folder" / "ldm.json").unlink()
    with pytest.raises(UnsafeCheckpoint, match="system"):
        ldm.load(tmp_path / "folder")
    assert not sentinel.exists()


@pytest.mark.parametrize("config", [None, FOLDER])
def test_a_zip_bomb_is_not_unpacked(config, tmp_path, monkeypatch):
    """Neither by this reader, nor by torch's, which unpacks a member before it looks at it."""
    path = tmp_path / "run" / "checkpoints" / "step-00000001.ckpt"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    monkeypatch.setattr(torch, "load", None)
    for source in (path, path.parent.parent):
        with pytest.raises(CorruptCheckpoint, match="data.pkl' is compressed"):
            ldm.load(source, load_config(config) if config else None)


NETWORK, STAGE, SCHEDULE = ("network",), ("first_stage",), ("denoiser", "params", "schedule")


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        (NETWORK, "model_channels", 2**20, "of another shape"),
        (NETWORK, "model_channels", 2**40, "overflow"),
        (NETWORK, "model_channels", 10**30, "overflow|Overflow"),
        (NETWORK, "model_channels", -32, "negative"),
        (NETWORK, "num_res_blocks", 10**9, "more than 50000 parameters"),
        (STAGE, "n_embed", 10**11, "of another shape"),
        (SCHEDULE, "timesteps", 10**11, "timesteps, which is absurd"),
    ],
)
def test_absurd_sizes_stop_before_memory_does(place, key, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.checkpoints.building._MOST_PARAMETERS", 2000)
    message = message.replace("50000", "2000")
    model = build("vq-unconditional")
    described = copy.deepcopy(model.description)
    node = described["model"]["params"]
    for name in place:
        node = node[name]
    node["params"][key] = value
    native.save_model(tmp_path / "model.safetensors", model.state_dict(), described)
    with pytest.raises(ValueError, match=message) as caught:
        ldm.load(tmp_path / "model.safetensors")
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("target", ["ldm.losses.LPIPS", "ldm.data.ImageFolder", "ldm.training.method.Method"])
def test_notes_and_records_name_parts_of_models_only(target, tmp_path):
    model = build("vq-unconditional")
    save_diffusers(model, tmp_path / "folder")
    note = json.loads((tmp_path / "folder" / "ldm.json").read_text())
    note["description"]["model"]["params"]["first_stage"] = {"target": target, "params": {}}
    (tmp_path / "folder" / "ldm.json").write_text(json.dumps(note))
    with pytest.raises(CheckpointError, match=f"{target}, which is no part of a model"):
        ldm.load(tmp_path / "folder")


@pytest.mark.parametrize(
    ("part_name", "keys", "message"),
    [
        ("unet", {"block_out_channels": None}, "unet/config.json.*make no sense"),
        ("unet", {"block_out_channels": []}, "unet/config.json.*make no sense"),
        ("unet", {"attention_head_dim": 0}, "unet/config.json.*make no sense"),
        ("unet", {"down_block_types": [1, 2]}, "unet/config.json.*make no sense"),
        ("unet", {"block_out_channels": [2**60, 2**61]}, "do not fit together"),
        ("vqvae", {"scaling_factor": "abc"}, "vqvae/config.json.*make no sense"),
        ("vqvae", {"num_vq_embeddings": 10**12}, "quantize.embedding.weight is .32, 3. in the file"),
        ("scheduler", {"trained_betas": "abc"}, "scheduler_config.json.*make no sense"),
        ("scheduler", {"prediction_type": [1]}, "scheduler_config.json.*make no sense"),
        ("scheduler", {"num_train_timesteps": 10**11}, "timesteps, which is absurd"),
    ],
)
def test_configs_of_diffusers_that_make_no_sense_are_named(part_name, keys, message, tmp_path):
    save_diffusers(build("vq-unconditional"), tmp_path / "folder")
    (tmp_path / "folder" / "ldm.json").unlink()
    file = next((tmp_path / "folder" / part_name).glob("*config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(CheckpointError, match=message):
        ldm.load(tmp_path / "folder")


def test_a_first_stage_of_an_unknown_class_does_not_pass_for_none(tmp_path):
    save_diffusers(build("vq-unconditional"), tmp_path / "folder")
    (tmp_path / "folder" / "ldm.json").unlink()
    file = tmp_path / "folder" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vqvae": ["diffusers", "AutoencoderTiny"]}))
    with pytest.raises(UnsupportedCheckpoint, match="no first stage of class.*AutoencoderTiny"):
        ldm.load(tmp_path / "folder")


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p["first_stage_config"]["params"]["ddconfig"].pop("ch_mult"),
            "c.yaml.*KeyError: 'ch_mult'",
        ),
        (lambda p: p.update(image_size=None), "c.yaml.*make no sense"),
        (lambda p: p.update(scale_factor="0.1"), "c.yaml.*latent_scale"),
        (lambda p: p["unet_config"]["params"].update(in_channels=9), "c.yaml.*takes 9 channels"),
        (lambda p: p["unet_config"]["params"].update(channel_mult="1,2"), "c.yaml.*channel_mult"),
    ],
)
def test_values_that_make_no_sense_are_told_with_the_yaml(change, message, state, tmp_path):
    path = lightning_checkpoint(tmp_path / "last.ckpt", state)
    with pytest.raises(ValueError, match=message):
        ldm.load(path, write_config(tmp_path / "c.yaml", changed(change)))


@pytest.mark.parametrize(
    ("scale", "by_std", "message"),
    [
        (torch.ones(3), False, "scale_factor of shape"),
        (torch.tensor(float("nan")), False, "carries scale_factor nan"),
        (torch.tensor(0.0), True, "scale_factor of 0"),
    ],
)
def test_scales_that_cannot_be(scale, by_std, message, state, tmp_path):
    path = lightning_checkpoint(tmp_path / "last.ckpt", state | {"scale_factor": scale})
    with pytest.raises(CheckpointError, match=message):
        ldm.load(path, changed(lambda p: p.update(scale_by_std=by_std)))


def test_the_wrong_yaml_is_explained(state, tmp_path):
    """A file with averages, and a file of the first stage alone, each with the other's YAML."""
    averaged = state | averaged_copies(state, "model.")
    path = lightning_checkpoint(tmp_path / "last.ckpt", averaged)
    with pytest.raises(KeyMismatch, match="does not fit VQModel"):
        ldm.load(path, load_config("compvis-vq"))
    first = "first_stage_model."
    alone = {name.removeprefix(first): t for name, t in state.items() if name.startswith(first)}
    path = lightning_checkpoint(tmp_path / "vae.ckpt", alone)
    with pytest.raises(
        KeyMismatch, match=r"does not fit LatentDiffusion(.|\n)*without their 'first_stage_mod"
    ):
        ldm.load(path, load_config(FOLDER))


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_types_that_are_none_for_weights(dtype, state, tmp_path):
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        ldm.load(lightning_checkpoint(tmp_path / "last.ckpt", state), load_config(FOLDER), dtype=dtype)


def test_conditions_are_what_the_conditioner_makes():
    model = build("kl-class-tokens")
    z, t, tokens = torch.zeros(2, *model.latent_shape), torch.tensor([1, 2]), torch.zeros(2, 1, 12)
    for wrong, told in ((tokens, "got a Tensor"), ({"context": tokens}, "got context"), ([tokens], "a list")):
        for call in (
            lambda cond: model.predict(z, t, cond),
            lambda cond: ldm.sample(model, n=2, cond=cond),
            lambda cond: ldm.sample(model, n=2, cond={"crossattn": tokens}, uncond=cond, guidance=2.0),
        ):
            with pytest.raises(ValueError, match=f"conditioner.batch. makes.*{told}"):
                call(wrong)
    with pytest.raises(ValueError, match="not a AutoencoderKL alone"):
        ldm.sample(model.first_stage_model, n=2)


# Folders and configs


def test_folders_of_the_original(state, tmp_path):
    """A run of the original, and the archives of first stages: a folder with model.ckpt and config.yaml."""
    run = tmp_path / "logs" / "2022-01-01T00-00-00_x"
    for name in ("checkpoints", "configs"):
        (run / name).mkdir(parents=True)
    lightning_checkpoint(run / "checkpoints" / "last.ckpt", state)
    config = write_config(run / "configs" / "2022-01-01T00-00-00-project.yaml", load_config(FOLDER))
    with pytest.raises(CheckpointError, match=f"holds checkpoints/last.ckpt.*config='{config}'"):
        ldm.load(run)
    with pytest.raises(CheckpointError, match=f"config='{config}'"):
        ldm.load(run / "checkpoints" / "last.ckpt")
    assert ldm.load(run, config).description["step"] == 1234
    archive = tmp_path / "model.ckpt"
    archive.mkdir()
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}
    lightning_checkpoint(archive / "model.ckpt", weights_of("compvis-autoencoder-kl") | loss)
    config = write_config(archive / "config.yaml", load_config("compvis-autoencoder-kl"))
    with pytest.raises(CheckpointError, match=f"model.ckpt may be another.*config='{config}'"):
        ldm.load(archive)
    assert ldm.load(archive, config).latent_channels == 4
    (archive / "other.pt").touch()
    with pytest.raises(CheckpointError, match="several files of weights; give one: model.ckpt, other.pt"):
        ldm.load(archive, config)
    with pytest.raises(ConfigError, match="is a folder, not a YAML file .in it: config.yaml"):
        ldm.load(archive / "model.ckpt", archive)


def test_shards_in_a_folder(tmp_path):
    weights, names = (
        weights_of("compvis-vq"),
        ("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"),
    )
    placed = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        held = {name: weights[name] for name, place in placed.items() if place == shard}
        write_safetensors(tmp_path / shard, held, {})
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    for source in (tmp_path, index):
        model = ldm.load(source, load_config("compvis-vq"))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="no description of their model.*needs that project's config"):
        ldm.load(index)


def test_a_training_config_of_this_toolkit_describes_bare_weights(tmp_path):
    """As `configs/autoencoder/*.yaml`; where the file describes itself, it says what may be imported only."""
    vq = load_config("compvis-vq")["model"]
    params = {name: vq["params"][name] for name in ("ddconfig", "embed_dim", "n_embed")}
    tree = {"task": "autoencoder", "data": {"params": {"root": "???"}}, "model": {**vq, "params": params}}
    config = write_config(tmp_path / "vq.yaml", tree)
    weights = weights_of("compvis-vq")
    write_safetensors(tmp_path / "bare.safetensors", weights, {})
    torch.save(weights, tmp_path / "bare.pt")
    for name in ("bare.safetensors", "bare.pt"):
        assert torch.equal(ldm.load(tmp_path / name, config).quant_conv.bias, weights["quant_conv.bias"])
    config = write_config(
        tmp_path / "unet.yaml", {"task": "diffusion", "network": {}, "first_stage": "runs/x"}
    )
    with pytest.raises(ConfigError, match="first stage is another run's"):
        ldm.load(tmp_path / "bare.pt", config)
    model = build("vq-unconditional")
    native.save_model(tmp_path / "model.safetensors", model.state_dict(), model.description)
    save_diffusers(model, tmp_path / "folder")
    for source in ("model.safetensors", "folder"):
        assert ldm.load(tmp_path / source, config).description["step"] == 1234


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_precision_draws_nearly_the_same(dtype, state, tmp_path):
    path, config = lightning_checkpoint(tmp_path / "last.ckpt", state), load_config(FOLDER)
    images, latents = [], []
    for model in (ldm.load(path, config), ldm.load(path, config, dtype=dtype)):
        cond, uncond = (model.conditioner({"label": torch.tensor(labels)}) for labels in ([0, 1], [2, 2]))
        z = ldm.sample(model, cond=cond, uncond=uncond, guidance=1.5, sampler="ddim", steps=2, eta=0.5)
        assert z.dtype == torch.float32  # the sampler's own, whatever the network computes in
        images.append(model.to_image(z).float())
        latents.append(model.to_latent(images[0].clamp(-1, 1)).float())
        assert model.predict(z, torch.tensor([3, 5]), cond).dtype == z.dtype
    # A codebook turns a small difference into another code here and there.
    for one, other in (images, latents):
        assert (one - other).abs().mean() < 0.1 * one.abs().mean()
    assert next(model.parameters()).dtype == dtype


def test_maps_in_half_precision():
    mapper = {"stages": 1, "in_channels": 3, "out_channels": 3}
    maps = conditioner("maps.SpatialRescaler", **mapper)["params"]["embedders"]
    maps.append(part("ldm.conditioning.maps.EncodedImage", key="image"))
    parts = {"first_stage": KL, "network": network(in_channels=9), "denoiser": discrete()}
    params = {**parts, "conditioner": part("ldm.conditioning.Conditioner", embedders=maps), "image_size": 16}
    described = {**description("kl-class-tokens"), "classes": None}
    described["model"] = part("ldm.latent_diffusion.LatentDiffusion", **params)
    model = randomized(native.build(described, "test")).to(torch.bfloat16)
    images = torch.rand(2, 3, 16, 16)
    cond = model.conditioner({"segmentation": images, "image": images})
    assert cond["concat"].shape == (2, 6, 8, 8)
    assert model.predict(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), cond).dtype == torch.float32


# Conversion


def test_buffers_that_no_file_holds_are_there_after_a_round_trip(tmp_path):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    encoder = part("ldm.models.vit.VisionTransformer", **sizes)
    images = conditioner("ImageEmbedder", model=encoder, dim=12, normalization="imagenet")
    params = {"first_stage": KL, "network": network(context_dim=12), "denoiser": discrete(), "image_size": 16}
    described = {**description("kl-class-tokens"), "classes": None}
    described["model"] = part("ldm.latent_diffusion.LatentDiffusion", **params, conditioner=images)
    model = randomized(native.build(described, "test"))
    native.save_model(tmp_path / "model.safetensors", model.state_dict(), described)
    convert(tmp_path / "model.safetensors", tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "native")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    batch = {"image": torch.rand(1, 3, 16, 16)}
    found = ldm.load(tmp_path / "folder").conditioner(batch)["crossattn"]
    assert torch.equal(found, model.conditioner(batch)["crossattn"])


def original_text_model(name: str) -> dict:
    tree = copy.deepcopy(STABLE_DIFFUSION["stable-diffusion/v1-inference"])
    params = tree["params"]
    params["unet_config"]["params"] |= {"model_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
    if name == "bert":
        target = "ldm.modules.encoders.modules.BERTEmbedder"
        sizes = {"n_embed": 16, "n_layer": 2, "vocab_size": 50, "max_seq_len": 9, "use_tokenizer": False}
        params["cond_stage_config"] = {"target": target, "params": sizes}
        params["unet_config"]["params"]["context_dim"] = 16
    return {"model": tree}


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_published_text_conditions_go_back_into_the_originals_format(name, tmp_path, monkeypatch):
    from ldm.checkpoints.originals import compvis_conditions
    from ldm.checkpoints.originals.original_yaml import read_original
    from ldm.checkpoints.originals.published import build_empty, translate

    monkeypatch.setitem(compvis_conditions.CLIP_VERSIONS, "openai/clip-vit-large-patch14", (768, 1, 12))
    tree = original_text_model(name)
    translated = translate(read_original(tree))
    view = translated.view(build_empty(translated))
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: 0.02 * torch.randn(value.shape, generator=generator) for key, value in view.state_dict().items()
    }
    path = lightning_checkpoint(tmp_path / "sd.ckpt", weights)
    written = convert(
        path, tmp_path / "again.ckpt", "compvis", config=write_config(tmp_path / "sd.yaml", tree)
    )
    assert written.files == (tmp_path / "again.ckpt", tmp_path / "again.yaml")
    content = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(content[key], value) for key, value in weights.items())
    described = ldm.load(tmp_path / "again.ckpt")
    by_yaml = ldm.load(tmp_path / "again.ckpt", tmp_path / "again.yaml")
    for model in (described, by_yaml):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), described.parameters(), strict=True))
    assert [e.key for e in by_yaml.conditioner.embedders] == ["txt"]


def test_sections_that_were_not_read_are_told_on_conversion(state, tmp_path):
    tree = load_config(FOLDER)
    tree["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {"train": {"target": "unreleased.Faces"}},
    }
    config = write_config(tmp_path / "config.yaml", tree)
    path = lightning_checkpoint(tmp_path / "last.ckpt", state)
    written = convert(path, tmp_path / "model.safetensors", "native", config=config)
    assert any(note.startswith("data: not read") and "unreleased.Faces" in note for note in written.notes)
