"""First stages to diffusers and back: the same numbers, every key, and what does not fit is refused."""

import json

import pytest
import torch
from diffusers_data import loaded_fully, noise, randomized, require_diffusers, same_weights
from reference_data import relative_error
from safetensors.torch import load_file, save_file

from ldm.arguments import arguments_of
from ldm.checkpoints.description import NotExpressible
from ldm.checkpoints.diffusers.export import save_diffusers
from ldm.checkpoints.diffusers.folder import load_diffusers
from ldm.checkpoints.diffusers.vae import latent_scale, scale_config
from ldm.checkpoints.strict import KeyMismatch
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.models.autoencoding_engine import AutoencodingEngine
from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint

DD = {
    "double_z": True, "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 16,
    "ch_mult": [1, 2, 3], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "num_groups": 8,
}  # fmt: skip
DD_VQ = {**DD, "double_z": False}
DD_BLACK_WHITE = {**DD, "in_channels": 1, "out_ch": 2, "num_res_blocks": 1}

MODELS = {
    "kl-attention-at-levels": lambda: AutoencoderKL({**DD, "attn_resolutions": [8, 16]}, 3),
    "kl-attention-in-the-middle": lambda: AutoencoderKL(DD, 3),
    "kl-no-attention": lambda: AutoencoderKL({**DD, "attn_type": "none"}, 3),
    "kl-other-channels": lambda: AutoencoderKL(DD_BLACK_WHITE, 3),
    "kl-no-quant-conv": lambda: AutoencodingEngine(DD, dict(DD)),
    "vq": lambda: VQModel({**DD_VQ, "attn_resolutions": [8]}, 16, 3),
    "vq-other-width": lambda: VQModel(DD_VQ, 16, 5),
}


@torch.no_grad()
def errors(ours, theirs) -> dict[str, float]:
    """Relative errors of encoding and decoding."""
    x, z = noise(2, ours.image_channels, 32, 32), noise(2, ours.latent_channels, 8, 8, seed=2)
    if isinstance(ours, VQModel):
        return {
            "encode": relative_error(ours.encode_to_prequant(x), theirs.encode(x).latents),
            "decode": relative_error(ours.decode_latent(z), theirs.decode(z).sample),
            "decode unquantized": relative_error(
                ours.decode(z), theirs.decode(z, force_not_quantize=True).sample
            ),
        }
    return {
        "encode": relative_error(ours.encode(x).parameters, theirs.encode(x).latent_dist.parameters),
        "decode": relative_error(ours.decode(z), theirs.decode(z).sample),
    }


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_loads_our_export_and_computes_the_same(name, tmp_path):
    diffusers = require_diffusers()
    model = randomized(MODELS[name]())
    save_diffusers(model, tmp_path / "vae")
    kind = json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"]
    found = errors(model, loaded_fully(getattr(diffusers, kind), tmp_path / "vae"))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", MODELS)
def test_an_export_comes_back_with_the_same_bits(name, tmp_path):
    model = randomized(MODELS[name]())
    save_diffusers(model, tmp_path / "vae")
    again = load_diffusers(tmp_path / "vae")
    assert type(again) is type(model)
    assert not again.training
    assert same_weights(again, model)
    x = noise(1, model.image_channels, 32, 32)
    with torch.no_grad():
        assert relative_error(again.moments(x)[0], model.moments(x)[0]) < 1e-5


REBUILT = {
    **MODELS,
    "linear": lambda: AutoencoderKL({**DD, "attn_type": "linear", "attn_resolutions": [8]}, 4),
    "channel-attention": lambda: AutoencoderKL(
        {**DD, "attn_type": "se", "attn_options": {"reduction": 4}, "attn_resolutions": [8]}, 3
    ),
    "averages": lambda: AutoencoderKL({**DD, "resamp_with_conv": False, "tanh_out": True}, 3),
}


@pytest.mark.parametrize("name", REBUILT)
def test_a_first_stage_is_rebuilt_from_the_arguments_that_it_remembers(name):
    model = randomized(REBUILT[name]()) if name in MODELS else REBUILT[name]().eval()
    again = type(model)(**arguments_of(model)).eval()
    again.load_state_dict(model.state_dict())
    x = noise(1, model.image_channels, 32, 32)
    with torch.no_grad():
        z = noise(1, model.latent_channels, 8, 8)
        assert model(x, z)[0].isfinite().all()
        assert relative_error(again(x, z)[0], model(x, z)[0]) < 1e-5


def test_arguments_of_a_quantizer_with_a_remap_and_of_no_first_stage():
    model = VQModel(DD_VQ, 16, 3, remap=[4, 2, 9], unknown_index="extra", beta=0.5, sane_index_shape=True)
    arguments = arguments_of(model)
    assert {k: arguments[k] for k in ("remap", "unknown_index", "beta", "sane_index_shape")} == {
        "remap": [4, 2, 9], "unknown_index": "extra", "beta": 0.5, "sane_index_shape": True,
    }  # fmt: skip
    assert arguments_of(IdentityFirstStage(2)) == {"channels": 2}


THEIRS = {
    "kl": ("AutoencoderKL", {}),
    "kl-no-quant-conv": ("AutoencoderKL", {"use_quant_conv": False, "use_post_quant_conv": False}),
    "kl-no-attention": ("AutoencoderKL", {"mid_block_add_attention": False}),
    "kl-attention": (
        "AutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        },
    ),
    "vq": ("VQModel", {"num_vq_embeddings": 16}),
    "vq-other-width": ("VQModel", {"num_vq_embeddings": 16, "vq_embed_dim": 6}),
}
THEIRS_BASE = {
    "block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 3, "sample_size": 30,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_a_first_stage_saved_by_diffusers_is_read_and_computes_the_same(name, tmp_path):
    diffusers = require_diffusers()
    kind, options = THEIRS[name]
    theirs = randomized(getattr(diffusers, kind)(**{**THEIRS_BASE, **options}))
    theirs.save_pretrained(tmp_path)
    found = errors(load_diffusers(tmp_path), theirs)
    assert max(found.values()) < 1e-5, found


def test_pickled_weights_and_variants_are_read(tmp_path):
    model = randomized(MODELS["kl-other-channels"]())
    save_diffusers(model, tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same_weights(load_diffusers(tmp_path / "vae"), model)
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").unlink()
    assert same_weights(load_diffusers(tmp_path / "vae"), model)
    save_file({}, file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(CorruptCheckpoint, match=r"bf16.*fp16"):
        load_diffusers(tmp_path / "vae")


def test_raw_weights_are_taken_where_the_folder_has_them(tmp_path):
    averaged, raw = (randomized(MODELS["kl-other-channels"](), seed) for seed in (0, 1))
    save_diffusers(averaged, tmp_path / "a")
    save_diffusers(raw, tmp_path / "b")
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "b" / name).rename(tmp_path / "a" / "diffusion_pytorch_model.non_ema.safetensors")
    assert same_weights(load_diffusers(tmp_path / "a"), averaged)
    assert same_weights(load_diffusers(tmp_path / "a", ema=False), raw)


def test_projections_that_are_convolutions_in_the_file_are_read(tmp_path):
    model = randomized(MODELS["kl-attention-at-levels"]())
    save_diffusers(model, tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    assert tensors[name].ndim == 2
    tensors[name] = tensors[name][:, :, None, None].clone()
    save_file(tensors, file)
    assert same_weights(load_diffusers(tmp_path / "vae"), model)


def test_missing_and_extra_keys_fail(tmp_path):
    save_diffusers(randomized(MODELS["vq"]()), tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.extra"] = tensors.pop("quantize.embedding.weight")
    save_file(tensors, file)
    with pytest.raises(KeyMismatch) as caught:
        load_diffusers(tmp_path / "vae")
    assert caught.value.missing == {"quantize.embedding.weight": (16, 3)}
    assert list(caught.value.extra) == ["encoder.extra"]


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: AutoencoderKL({**DD, "attn_type": "linear"}, 3), "linear"),
        (lambda: AutoencoderKL({**DD, "resamp_with_conv": False}, 3), "resamp_with_conv"),
        (lambda: AutoencoderKL({**DD, "tanh_out": True}, 3), "tanh_out"),
        (lambda: AutoencoderKL({**DD, "ch_mult": [2, 4]}, 3), "ch_mult"),
        (lambda: AutoencoderKL(DD, 4), "embed_dim 4"),
        (lambda: AutoencoderKL({**DD, "attn_type": "none", "attn_resolutions": [8]}, 3), "attn_type"),
        (lambda: VQModel(DD_VQ, 16, 3, remap=[1, 2]), "remapped"),
        (lambda: IdentityFirstStage(), "IdentityFirstStage"),
        (lambda: AutoencodingEngine(DD_VQ, DD_VQ, "none"), "AutoencodingEngine"),
        (lambda: AutoencodingEngine(DD, {**DD, "ch_mult": [1, 2, 4]}), "mirror"),
    ],
)
def test_first_stages_that_diffusers_cannot_hold_are_refused(tmp_path, build, reason):
    with pytest.raises(NotExpressible, match=reason):
        save_diffusers(build(), tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"use_quant_conv": False}, "use_post_quant_conv"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "other levels"),
        ({"down_block_types": ["SkipDownBlock2D"] * 3}, "SkipDownBlock2D"),
        ({"block_out_channels": [16, 24, 48]}, "no multiples"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"_class_name": None}, "no config of diffusers"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(tmp_path, keys, reason):
    save_diffusers(MODELS["kl-no-attention"](), tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        load_diffusers(tmp_path / "vae")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1', "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match="config.json"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    "shift, scale, one_number, expected",
    [
        ([0.0] * 2, [0.5] * 2, False, {"scaling_factor": 0.5, "shift_factor": None}),
        ([0.25] * 2, [0.5] * 2, False, {"scaling_factor": 0.5, "shift_factor": 0.25}),
        ([0.25, 1.0], [0.5, 2.0], False,
         {"scaling_factor": 1.0, "latents_mean": [0.25, 1.0], "latents_std": [2.0, 0.5]}),
        ([0.0] * 2, [0.5] * 2, True, {"scaling_factor": 0.5}),
        ([0.25] * 2, [0.5] * 2, True, {"scaling_factor": 1.0}),
    ],
)  # fmt: skip
def test_the_latents_scale_has_its_place(shift, scale, one_number, expected):
    config = scale_config(shift, scale, one_number)
    assert config == expected
    if not one_number:
        found = latent_scale({"_class_name": "AutoencoderKL", **config})
        assert [v * (2 // len(v)) for v in found] == [shift, scale]


def test_a_config_without_a_scale_means_that_of_stable_diffusion():
    assert latent_scale({"_class_name": "AutoencoderKL"}) == ([0.0], [0.18215])
