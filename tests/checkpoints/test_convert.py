"""`ldm convert`: round trips to the bit, the original's files, and what is refused."""

import json

import pytest
import torch
import yaml
from command_line import cli
from diffusers_data import noise, randomized, same_weights
from diffusers_models import CLASSES, DD, ENDS, FLOW, KL, conditioner, description, discrete, network, part
from diffusers_models import build as build_for_diffusers
from reference_data import relative_error

import ldm
from ldm.checkpoints import native
from ldm.checkpoints.convert import convert
from ldm.checkpoints.description import NotExpressible
from ldm.checkpoints.originals.compvis_export import is_exported, save_compvis
from ldm.checkpoints.originals.compvis_yaml import original_config
from ldm.checkpoints.strict import KeyMismatch
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling import sample
from ldm.weights.errors import CheckpointError

__all__ = ["cli"]

# As the originals are: 32 groups in every norm.
WIDE_DD = {**DD, "ch": 32, "num_groups": 32}
WIDE_KL = part("ldm.models.autoencoder.AutoencoderKL", ddconfig={**WIDE_DD, "double_z": True}, embed_dim=3)
WIDE_VQ = part(
    "ldm.models.autoencoder.VQModel", ddconfig={**WIDE_DD, "double_z": False}, n_embed=32, embed_dim=3
)
PIXELS = part("ldm.models.autoencoder.IdentityFirstStage", channels=3)


def wide(**params) -> dict:
    return network(**{"model_channels": 32, "num_groups": 32, **params})


CHANNELS = ([0.1, -0.3, 0.7], [1.3, 0.7, 0.11])
# name -> (parts, latents' shift and scale)
MODELS = {
    "kl-class-tokens": (
        {"first_stage": WIDE_KL, "network": wide(context_dim=12), "denoiser": discrete(),
         "conditioner": conditioner("ClassEmbedder", num_classes=3, dim=12)},
        ([0.0], [0.18215]),
    ),
    "kl-normalised": (
        {"first_stage": WIDE_KL, "network": wide(), "denoiser": discrete("x0", schedule="cosine")}, CHANNELS,
    ),
    "kl-class-label-v": (
        {"first_stage": WIDE_KL, "denoiser": discrete("v", schedule="sqrt_linear"),
         "network": wide(num_classes=4, resblock_updown=True, use_scale_shift_norm=True),
         "conditioner": conditioner("ClassLabel", num_classes=3)},
        ([0.0], [0.5]),
    ),
    "vq": ({"first_stage": WIDE_VQ, "network": wide(), "denoiser": discrete()}, ([0.0], [1.7])),
    "pixels-own-betas": (
        {"first_stage": PIXELS, "network": wide(use_new_attention_order=True),
         "denoiser": discrete(betas=[0.001 * (1 + i % 7) for i in range(50)])},
        ([0.0], [1.0]),
    ),
}  # fmt: skip


def described(parts: dict) -> dict:
    params = {"conditioner": None, **parts, "image_size": [16, 16]}
    return {
        **description("vq-unconditional"),
        "model": {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params},
        "classes": CLASSES if params["conditioner"] else None,
    }


def build(parts: dict, scale=CHANNELS) -> LatentDiffusion:
    model = randomized(native.build(described(parts), "test"))
    for buffer, values in zip((model.latent_shift, model.latent_scale), scale, strict=True):
        buffer.copy_(torch.tensor(values).reshape(-1, 1, 1).expand_as(buffer))
    return model


def save(model, path):
    native.save_model(path, model.state_dict(), model.description)
    return path


@pytest.fixture
def native_file(tmp_path):
    return lambda name: save(build(*MODELS[name]), tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_native_to_compvis_to_native_is_byte_equal(name, native_file, tmp_path):
    source = native_file(name)
    convert(source, tmp_path / "original.ckpt", "compvis")
    convert(tmp_path / "original.ckpt", tmp_path / "again.safetensors", "native")
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["kl-class-tokens", "kl-class-vector-flow", "vq-unconditional"])
def test_native_to_diffusers_to_native_is_byte_equal(name, tmp_path):
    source = save(build_for_diffusers(name), tmp_path / "model.safetensors")
    convert(source, tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "native")
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("tree", [KL, WIDE_KL, WIDE_VQ], ids=["narrow", "kl", "vq"])
def test_first_stages_alone_make_the_round_trip(tree, tmp_path):
    described = {
        "format": native.FORMAT,
        "model": tree,
        "classes": None,
        "weights": "ema",
        "image_size": [32, 32],
    }
    model = randomized(native.build(described, "test"))
    source = save(model, tmp_path / "model.safetensors")
    ways = {"diffusers": "folder"} | ({} if tree is KL else {"compvis": "first.ckpt"})
    for to, name in ways.items():
        convert(source, tmp_path / name, to)
        convert(tmp_path / name, tmp_path / f"{to}.safetensors", "native")
        assert (tmp_path / f"{to}.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_original_yaml_alone_gives_the_same_model(name, native_file, tmp_path):
    """What the original's own code sees: the state dict and the YAML, without our record."""
    source = ldm.load(native_file(name))
    convert(tmp_path / "model.safetensors", tmp_path / "original.ckpt", "compvis")
    content = torch.load(tmp_path / "original.ckpt", weights_only=True)
    del content["ldm"]
    torch.save(content, tmp_path / "plain.ckpt")
    model = ldm.load(tmp_path / "plain.ckpt", config=tmp_path / "original.yaml")
    x, t, labels = noise(2, *source.latent_shape), torch.tensor([3.0, 40.0]), torch.tensor([0, 2])
    with torch.no_grad():
        cond = source.conditioner({"label": labels}) if source.conditioner.keys else {}
        assert relative_error(model.predict(x, t, cond), source.predict(x, t, cond)) < 1e-5
        # The latents of a normalised model are its first stage's own there.
        assert relative_error(model.to_image(x), source.to_image(x)) < 1e-5
        image = noise(1, 3, 16, 16)
        assert relative_error(model.to_latent(image), source.to_latent(image)) < 1e-5
        drawn = noise(1, *source.latent_shape)
        assert relative_error(model.to_latent(image, drawn), source.to_latent(image, drawn)) < 1e-5
    options = {"noise": x, "sampler": "ddim", "steps": 5, "spacing": "uniform", "cond": cond or None}
    assert relative_error(sample(model, **options), sample(source, **options)) < 1e-5


def test_the_original_state_dict_has_its_names_and_tables(native_file, tmp_path):
    model = ldm.load(native_file("kl-class-tokens"))
    save_compvis(model, tmp_path / "original.ckpt")
    content = torch.load(tmp_path / "original.ckpt", weights_only=True)
    names = set(content["state_dict"])
    assert {n.split(".")[0] for n in names if "." in n} == {"model", "first_stage_model", "cond_stage_model"}
    assert content["state_dict"]["cond_stage_model.embedding.weight"].shape == (4, 12)
    assert content["global_step"] == 1234
    tables = {n: t for n, t in content["state_dict"].items() if "." not in n}
    assert len(tables) == 12
    assert torch.equal(tables["alphas_cumprod"], model.denoiser.schedule.alphas_cumprod.float())
    params = yaml.safe_load((tmp_path / "original.yaml").read_text())["model"]["params"]
    expected = {**ENDS, "timesteps": 1000, "parameterization": "eps", "conditioning_key": "crossattn",
                "channels": 3, "image_size": 8, "scale_factor": 0.18215}  # fmt: skip
    expected["beta_schedule"] = expected.pop("schedule")
    assert {name: params[name] for name in expected} == pytest.approx(expected)
    assert params["cond_stage_config"]["params"] == {"n_classes": 4, "embed_dim": 12, "key": "class_label"}


def test_a_file_of_weights_is_no_larger_than_its_weights(native_file, tmp_path):
    """Weights that were read as pages of one file must not be written with the whole file behind each."""
    source = native_file("vq")
    convert(source, tmp_path / "original.ckpt", "compvis")
    assert (tmp_path / "original.ckpt").stat().st_size < 1.2 * source.stat().st_size + 2**18


@pytest.mark.parametrize(
    "parts, scale, reason",
    [
        ({"first_stage": KL, "network": wide(), "denoiser": discrete()}, CHANNELS, "groups of the first"),
        ({"first_stage": WIDE_KL, "network": network(), "denoiser": discrete()}, CHANNELS, "of the net"),
        ({"first_stage": WIDE_KL, "network": wide(), "denoiser": FLOW}, CHANNELS, "flow"),
        ({"first_stage": WIDE_VQ, "network": wide(), "denoiser": discrete()}, CHANNELS, "shift"),
        (
            {"first_stage": WIDE_KL, "network": wide(), "denoiser": discrete("v", zero_terminal_snr=True)},
            CHANNELS,
            "zero_terminal_snr",
        ),
        (
            {"first_stage": PIXELS, "network": wide(out_channels=6),
             "denoiser": discrete(learned_variance=True)},
            ([0.0], [1.0]),
            "learned_variance",
        ),
        (
            {"first_stage": WIDE_KL, "denoiser": discrete(),
             "network": wide(num_classes="sequential", adm_in_channels=6),
             "conditioner": conditioner("ClassEmbedder", num_classes=3, dim=6, kind="vector")},
            CHANNELS,
            "ClassEmbedder",
        ),
    ],
)  # fmt: skip
def test_what_the_original_cannot_express_is_refused(parts, scale, reason, tmp_path):
    with pytest.raises(NotExpressible, match=reason):
        save_compvis(build(parts, scale), tmp_path / "original.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_every_reason_is_given_at_once():
    parts = {
        "first_stage": KL,
        "network": network(attn_type="se", attention_resolutions=[1]),
        "denoiser": FLOW,
    }
    with pytest.raises(NotExpressible) as caught:
        original_config(build(parts))
    assert len(caught.value.reasons) == 5


def test_an_export_is_loaded_strictly(native_file, tmp_path):
    convert(native_file("vq"), tmp_path / "original.ckpt", "compvis")
    content = torch.load(tmp_path / "original.ckpt", weights_only=True)
    del content["state_dict"]["model.diffusion_model.out.2.bias"]
    content["state_dict"]["stray"] = torch.zeros(1)
    torch.save(content, tmp_path / "original.ckpt")
    with pytest.raises(KeyMismatch) as caught:
        ldm.load(tmp_path / "original.ckpt")
    assert (list(caught.value.missing), list(caught.value.extra)) == (
        ["model.diffusion_model.out.2.bias"],
        ["stray"],
    )


def test_records_of_another_format_and_raw_weights_are_refused(native_file, tmp_path):
    convert(native_file("vq"), tmp_path / "original.ckpt", "compvis")
    with pytest.raises(CheckpointError, match="EMA"):
        ldm.load(tmp_path / "original.ckpt", ema=False)
    content = torch.load(tmp_path / "original.ckpt", weights_only=True)
    content["ldm"]["format"] = "ldm-compvis/9"
    torch.save(content, tmp_path / "original.ckpt")
    with pytest.raises(CheckpointError, match="ldm-compvis/9"):
        ldm.load(tmp_path / "original.ckpt")
    assert not is_exported(native_file("vq"))


def test_a_record_cannot_name_foreign_code(native_file, tmp_path):
    convert(native_file("vq"), tmp_path / "original.ckpt", "compvis")
    content = torch.load(tmp_path / "original.ckpt", weights_only=True)
    found = json.loads(content["ldm"]["description"])
    found["model"]["params"]["network"] = {"target": "os.system", "params": {"command": "true"}}
    content["ldm"]["description"] = json.dumps(found)
    torch.save(content, tmp_path / "original.ckpt")
    with pytest.raises(ValueError, match=r"os\.system"):
        ldm.load(tmp_path / "original.ckpt")


# The verb


def test_convert_on_the_command_line(cli, native_file, tmp_path):
    source = native_file("kl-class-tokens")
    for to, target, written in (
        ("native", "a", ["model.safetensors"]),
        ("compvis", "b", ["model.ckpt", "model.yaml"]),
        ("diffusers", "c", ["conditioner", "ldm.json", "scheduler", "unet", "vae"]),
    ):
        result = cli("convert", source, tmp_path / target, "--to", to)
        assert (result.status, result.err) == (0, "")
        assert str(tmp_path / target) in result.out
        assert sorted(path.name for path in (tmp_path / target).iterdir()) == written
    first, *others = (ldm.load(path) for path in (source, tmp_path / "b" / "model.ckpt", tmp_path / "c"))
    assert all(same_weights(other, first) for other in others)


def test_mistakes_are_told_in_one_line(cli, native_file, tmp_path):
    source = native_file("kl-normalised")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "old.ckpt").touch()
    for arguments, told in (
        ((source, tmp_path / "full", "--to", "diffusers"), "exists already"),
        ((source, tmp_path / "old.ckpt", "--to", "compvis"), "--overwrite"),
        ((source, tmp_path / "out.ckpt", "--to", "native"), "writes a .safetensors file"),
        ((source, tmp_path / "out.safetensors", "--to", "diffusers"), "writes a folder"),
        ((source, source, "--to", "native"), "over itself"),
        ((tmp_path / "no", tmp_path / "out", "--to", "native"), "does not exist"),
    ):
        result = cli("convert", *arguments)
        assert result.status == 1
        assert result.err.startswith("error: ")
        assert told in result.err
    assert cli("convert", source, tmp_path / "old.ckpt", "--to", "compvis", "--overwrite").status == 0
    assert cli("convert", source, tmp_path / "out", "--to", "onnx").status == 2


def test_convert_as_a_call(native_file, tmp_path):
    source = native_file("vq")
    written = ldm.convert(source, tmp_path / "a" / "b")
    assert (written.path, written.notes) == (tmp_path / "a" / "b" / "model.safetensors", ())
    assert written.files == (written.path,) and written.path.read_bytes() == source.read_bytes()
    folder = ldm.convert(str(source), str(tmp_path / "c"), "diffusers")
    assert {file.parent.name for file in folder.files} == {"c", "scheduler", "unet", "vqvae"}
    with pytest.raises(FileExistsError, match="exists already"):
        ldm.convert(source, written.path)
    assert ldm.convert(source, written.path, overwrite=True).path == written.path
    with pytest.raises(ValueError, match="format 'onnx' is none of native, compvis, diffusers"):
        ldm.convert(source, tmp_path / "d", "onnx")


def test_an_original_checkpoint_becomes_one_file_that_describes_itself(native_file, tmp_path):
    convert(native_file("kl-class-tokens"), tmp_path / "original.ckpt", "compvis")
    content = torch.load(tmp_path / "original.ckpt", weights_only=True)
    del content["ldm"]
    torch.save(content, tmp_path / "plain.ckpt")
    convert(
        tmp_path / "plain.ckpt", tmp_path / "own.safetensors", "native", config=tmp_path / "original.yaml"
    )
    again, expected = ldm.load(tmp_path / "own.safetensors"), ldm.load(tmp_path / "model.safetensors")
    assert same_weights(again.network, expected.network)
    assert same_weights(again.first_stage_model, expected.first_stage_model)
