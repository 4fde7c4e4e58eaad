"""Whole models as folders of diffusers: what is in them, what comes back, and sampling there and here."""

import json

import pytest
import torch
from diffusers_data import loaded_fully, noise, randomized, require_diffusers, same_weights
from diffusers_models import MODELS, build
from reference_data import relative_error
from safetensors.torch import load_file, save_file

from ldm.checkpoints import native
from ldm.checkpoints.diffusers.export import class_table, save_diffusers
from ldm.checkpoints.diffusers.folder import is_diffusers_folder, load_diffusers
from ldm.checkpoints.strict import KeyMismatch
from ldm.conditioning.clip import CLIPTextEmbedder
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling import sample
from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint


def config(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def change(file, **keys):
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.fixture
def exported(tmp_path):
    def export(name):
        model = build(name)
        save_diffusers(model, tmp_path / "out")
        return model, tmp_path / "out"

    return export


@pytest.mark.parametrize("name", MODELS)
def test_an_export_comes_back_with_the_same_bits_and_description(name, exported):
    model, folder = exported(name)
    again = load_diffusers(folder)
    assert is_diffusers_folder(folder)
    assert same_weights(again, model)
    assert again.description == model.description
    assert not again.training
    x, t = noise(2, *model.latent_shape), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        cond = model.conditioner({"label": torch.tensor([0, 2])}) if model.conditioner.keys else {}
        assert relative_error(again.predict(x, t, cond), model.predict(x, t, cond)) < 1e-5
        assert relative_error(again.to_image(x), model.to_image(x)) < 1e-5


@pytest.mark.parametrize(
    "name, files, index",
    [
        ("kl-class-tokens", {"vae", "unet", "scheduler", "conditioner", "ldm.json"}, None),
        ("kl-class-label-v", {"vae", "unet", "scheduler", "ldm.json"}, None),
        ("vq-unconditional", {"vqvae", "unet", "scheduler", "ldm.json", "model_index.json"}, "LDMPipeline"),
        ("vq-unconditional-normalised", {"vqvae", "unet", "scheduler", "ldm.json"}, None),
        ("pixels-unconditional", {"unet", "scheduler", "ldm.json", "model_index.json"}, "DDIMPipeline"),
        ("pixels-learned-variance", {"unet", "scheduler", "ldm.json"}, None),
    ],
)
def test_a_pipeline_is_named_only_where_one_fits(name, files, index, exported):
    _, folder = exported(name)
    assert {path.name for path in folder.iterdir()} == files
    assert index is None or config(folder, "model_index.json")["_class_name"] == index


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_loads_every_part(name, exported):
    diffusers = require_diffusers()
    model, folder = exported(name)
    unet = loaded_fully(getattr(diffusers, config(folder / "unet")["_class_name"]), folder / "unet")
    scheduler = config(folder / "scheduler", "scheduler_config.json")["_class_name"]
    getattr(diffusers, scheduler).from_pretrained(folder / "scheduler").set_timesteps(10)
    x, t, label = noise(2, *model.latent_shape), torch.tensor([3.0, 500.0]), torch.tensor([0, 2])
    with torch.no_grad():
        cond = model.conditioner({"label": label}) if model.conditioner.keys else {}
        given = {"encoder_hidden_states": cond["crossattn"]} if "crossattn" in cond else {}
        given |= {"class_labels": label} if "vector" in cond else {}
        assert relative_error(model.predict(x, t, cond), unet(x, t, **given).sample) < 1e-5
    for part, kind in (("vae", diffusers.AutoencoderKL), ("vqvae", diffusers.VQModel)):
        if (folder / part).exists():
            vae = loaded_fully(kind, folder / part)
            with torch.no_grad():
                z = model.denormalize(x)
                assert relative_error(model.to_image(x), vae.decode(z).sample) < 1e-5


def test_the_latents_scale_is_carried_over(exported):
    model, folder = exported("kl-class-tokens")
    vae = config(folder / "vae")
    mean, std = (torch.tensor(vae[name]).reshape(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    z = noise(1, *model.latent_shape)
    # As the pipelines of diffusers undo it.
    assert relative_error(z * std / vae["scaling_factor"] + mean, model.denormalize(z)) < 1e-6


def in_float64(scheduler, model) -> None:
    """Give a scheduler its table of alphas unrounded.

    diffusers multiplies them up in float32: a cosine's alphas are off by 1e-5 then, and 1 - alpha, where it
    is small, by 2e-4, which is what the end points differ by.
    """
    table = model.denoiser.schedule.alphas_cumprod
    assert relative_error(scheduler.alphas_cumprod, table) < 1e-5
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = table, table[0]


@torch.no_grad()
def ddim_of_diffusers(folder, x, steps, exact_for=None, **cond):
    diffusers = require_diffusers()
    unet = loaded_fully(getattr(diffusers, config(folder / "unet")["_class_name"]), folder / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    if exact_for:
        in_float64(scheduler, exact_for)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, **cond).sample, t, x).prev_sample
    return x


def test_ddim_ends_at_the_same_point_with_the_originals_timesteps(exported):
    model, folder = exported("kl-class-tokens")
    x = noise(2, *model.latent_shape)
    with torch.no_grad():
        cond = model.conditioner({"label": torch.tensor([0, 2])})
    how = {"sampler": "ddim", "steps": 10, "spacing": "uniform", "guidance": 1.0}
    ours = sample(model, cond=cond, noise=x, **how)
    theirs = ddim_of_diffusers(folder, x, 10, encoder_hidden_states=cond["crossattn"])
    assert relative_error(ours, theirs) < 1e-5


def test_ddim_ends_at_the_same_point_with_v_and_no_signal_at_the_end(exported):
    model, folder = exported("kl-class-label-v")
    x, labels = noise(2, *model.latent_shape), torch.tensor([0, 2])
    ours = sample(model, cond={"vector": labels}, noise=x, sampler="ddim", steps=10, spacing="trailing")
    theirs = ddim_of_diffusers(folder, x, 10, class_labels=labels)
    assert relative_error(ours, theirs) < 1e-5


def test_ddim_ends_at_the_same_point_with_x0_on_a_cosine(exported):
    model, folder = exported("pixels-unconditional")
    x = noise(2, *model.latent_shape)
    ours = sample(model, noise=x, sampler="ddim", steps=10, spacing="uniform")
    assert relative_error(ours, ddim_of_diffusers(folder, x, 10)) < 1e-3
    assert relative_error(ours, ddim_of_diffusers(folder, x, 10, exact_for=model)) < 1e-5


@torch.no_grad()
def test_a_flow_ends_at_the_same_point(exported):
    diffusers = require_diffusers()
    model, folder = exported("kl-class-vector-flow")
    x, labels = noise(2, *model.latent_shape), torch.tensor([0, 2])
    cond = model.conditioner({"label": labels})
    ours = sample(model, cond=cond, noise=x, sampler="euler", steps=5)
    unet = loaded_fully(diffusers.UNet2DModel, folder / "unet")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    # Pure noise is sigma = 1e6 here, so the time is 1 - 1e-6.
    scheduler.set_timesteps(sigmas=[1e6 / (1e6 + 1), 0.8, 0.6, 0.4, 0.2])
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(unet(theirs, t, class_labels=labels).sample, t, theirs).prev_sample
    assert relative_error(ours, theirs) < 1e-5


@torch.no_grad()
def test_edm_ends_at_the_same_point(exported):
    diffusers = require_diffusers()
    model, folder = exported("vq-unconditional-normalised")
    x = noise(2, *model.latent_shape)
    ours = sample(model, noise=x, sampler="euler", steps=5)
    unet = loaded_fully(diffusers.UNet2DModel, folder / "unet")
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(5)
    theirs = x * 80.0
    for t in scheduler.timesteps:
        theirs = scheduler.step(unet(scheduler.scale_model_input(theirs, t), t).sample, t, theirs).prev_sample
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "name, kind", [("vq-unconditional", "LDMPipeline"), ("pixels-unconditional", "DDIMPipeline")]
)
def test_the_pipeline_that_is_named_draws_the_same_images(name, kind, exported):
    diffusers = require_diffusers()
    model, folder = exported(name)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert type(pipeline).__name__ == kind
    pipeline.set_progress_bar_config(disable=True)
    if kind == "DDIMPipeline":
        in_float64(pipeline.scheduler, model)
    start = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(5))
    # Two generators of one seed: in either pipeline the first numbers are the starting noise.
    images = pipeline(
        batch_size=2, num_inference_steps=10, output_type="np", generator=torch.Generator().manual_seed(5)
    ).images
    z = sample(model, noise=start, sampler="ddim", steps=10, spacing="uniform")
    ours = (model.to_image(z) / 2 + 0.5).clamp(0, 1)
    assert (ours - torch.from_numpy(images).permute(0, 3, 1, 2)).abs().max() < 1e-5


# Pipelines of diffusers itself


def saved_pipeline(diffusers, folder, scheduler=None, **unet):
    """A pipeline as diffusers saves it: a UNet, a first stage and a scheduler of its own making."""
    base = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    net = diffusers.UNet2DModel(
        **base, sample_size=8, in_channels=3, **{"out_channels": 3, **unet}, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vqvae = diffusers.VQModel(
        **base, sample_size=16, latent_channels=3, num_vq_embeddings=32, scaling_factor=0.7,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = scheduler or diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipeline = diffusers.LDMPipeline(randomized(vqvae), randomized(net), scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


def test_a_pipeline_saved_by_diffusers_is_read_and_draws_the_same_images(tmp_path):
    diffusers = require_diffusers()
    pipeline = saved_pipeline(diffusers, tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    model = load_diffusers(tmp_path)
    assert isinstance(model, LatentDiffusion)
    assert model.image_size == (16, 16)
    assert model.latent_scale.flatten().tolist() == pytest.approx([0.7] * 3)
    assert model.description["sampling"] == {"sampler": "ddim", "spacing": "uniform"}
    start = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(5))
    images = pipeline(
        batch_size=2, num_inference_steps=10, output_type="np", generator=torch.Generator().manual_seed(5)
    ).images
    z = sample(model, noise=start, steps=10, **model.description["sampling"])
    ours = (model.to_image(z) / 2 + 0.5).clamp(0, 1)
    assert (ours - torch.from_numpy(images).permute(0, 3, 1, 2)).abs().max() < 1e-5


def test_a_description_made_from_a_pipeline_builds_it_again(tmp_path):
    diffusers = require_diffusers()
    saved_pipeline(diffusers, tmp_path / "theirs")
    model = load_diffusers(tmp_path / "theirs")
    native.save_model(tmp_path / "model.safetensors", model.state_dict(), model.description)
    assert same_weights(native.load_model(tmp_path / "model.safetensors"), model)


TEXT_ENCODER = {
    "vocab_size": 49408, "max_position_embeddings": 6, "hidden_size": 12, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip


def text_to_image(tmp_path, padding="<|endoftext|>"):
    """(model, pipeline's folder): a small Stable Diffusion 1 as diffusers and transformers save it."""
    model = build("kl-class-tokens")
    del model.description
    folder = tmp_path / "out"
    save_diffusers(model, folder)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    sizes = {"max_length": 6, "width": 12, "layers": 2, "heads": 3, "mlp_width": 20}
    encoder = randomized(CLIPTextEmbedder(**sizes))
    tensors = {n.removeprefix("transformer."): t for n, t in encoder.state_dict().items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(6)[None]
    for name, content in (
        ("text_encoder/config", TEXT_ENCODER),
        ("tokenizer/special_tokens_map", {"pad_token": padding}),
    ):
        (folder / name).parent.mkdir()
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_file(tensors, folder / "text_encoder" / "model.safetensors")
    return model, encoder, folder


def test_the_text_encoder_of_stable_diffusion_1_is_read(tmp_path):
    model, encoder, folder = text_to_image(tmp_path)
    again = load_diffusers(folder)
    tokens = torch.tensor([[49406, 5, 9, 49407, 49407, 49407], [49406, 49407, 49407, 49407, 49407, 49407]])
    x, t = noise(2, *model.latent_shape), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        cond = again.conditioner({"txt": tokens})
        assert relative_error(cond["crossattn"], encoder.encode(tokens)["crossattn"]) < 1e-5
        assert relative_error(again.conditioner.unconditional(1)["crossattn"][0], cond["crossattn"][1]) < 1e-5
        assert relative_error(again.predict(x, t, cond), model.predict(x, t, cond)) < 1e-5
        assert relative_error(again.to_image(x), model.to_image(x)) < 1e-5
    native.save_model(tmp_path / "model.safetensors", again.state_dict(), again.description)
    assert same_weights(native.load_model(tmp_path / "model.safetensors"), again)


def test_a_text_encoder_that_lacks_a_weight_fails(tmp_path):
    _, _, folder = text_to_image(tmp_path)
    change_tensors(
        folder / "text_encoder" / "model.safetensors", lambda t: t.pop("text_model.final_layer_norm.bias")
    )
    with pytest.raises(KeyMismatch, match=r"final_layer_norm\.bias"):
        load_diffusers(folder)


def test_other_text_encoders_are_left_out_aloud(tmp_path, caplog):
    model, _, folder = text_to_image(tmp_path, padding="!")
    again = load_diffusers(folder)
    assert "text_encoder (CLIPTextModel)" in caplog.text
    assert "pads with '!'" in caplog.text
    x, t, context = noise(2, *model.latent_shape), torch.tensor([3.0, 500.0]), noise(2, 7, 12, seed=2)
    with torch.no_grad():
        expected = model.predict(x, t, {"crossattn": context})
        assert relative_error(again.predict(x, t, {"crossattn": context}), expected) < 1e-5


@pytest.mark.parametrize(
    "index, reason",
    [
        ({"unet": ["diffusers", "DiTTransformer2DModel"]}, "no network"),
        ({"a": ["diffusers", "UNet2DModel"], "b": ["diffusers", "UNet2DModel"]}, "2 network"),
        ({}, "no network"),
    ],
)
def test_pipelines_without_one_unet_are_refused(tmp_path, index, reason):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        load_diffusers(tmp_path)


def test_a_pipeline_for_inpainting_is_refused_with_the_reason(tmp_path):
    diffusers = require_diffusers()
    saved_pipeline(diffusers, tmp_path)
    change(tmp_path / "unet" / "config.json", in_channels=7)
    with pytest.raises(UnsupportedCheckpoint, match="takes 7 channels and the latents have 3"):
        load_diffusers(tmp_path)


def test_a_part_that_is_absent_is_named(tmp_path):
    diffusers = require_diffusers()
    saved_pipeline(diffusers, tmp_path)
    (tmp_path / "vqvae" / "config.json").unlink()
    with pytest.raises(CorruptCheckpoint, match="vqvae"):
        load_diffusers(tmp_path)


# The note beside the parts


def test_a_config_changed_after_the_export_is_no_silent_matter(exported):
    _, folder = exported("kl-class-tokens")
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(CheckpointError, match=r"scheduler_config.*changed.*prediction_type='v_prediction'"):
        load_diffusers(folder)


def test_a_part_saved_again_by_diffusers_is_still_known(exported):
    diffusers = require_diffusers()
    model, folder = exported("kl-class-tokens")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    with torch.no_grad():
        unet.conv_in.bias.add_(1.0)
    unet.save_pretrained(folder / "unet")
    again = load_diffusers(folder)
    moved = again.network.input_blocks[0][0].bias - model.network.input_blocks[0][0].bias
    assert torch.allclose(moved, torch.ones_like(moved))


@pytest.mark.parametrize("name", ["latent_scale", "latent_shift"])
def test_a_note_with_other_numbers_contradicts_the_configs(name, exported):
    _, folder = exported("kl-class-tokens")
    change(folder / "ldm.json", **{name: [9.0, 9.0, 9.0]})
    with pytest.raises(CheckpointError, match="changed"):
        load_diffusers(folder)


def test_a_note_cannot_name_foreign_code(exported):
    _, folder = exported("kl-class-tokens")
    note = config(folder, "ldm.json")
    note["description"]["model"]["params"]["network"] = {"target": "os.system", "params": {"command": "true"}}
    (folder / "ldm.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match=r"os\.system"):
        load_diffusers(folder)


def test_notes_of_another_format_and_raw_weights_are_refused(exported):
    _, folder = exported("kl-class-tokens")
    with pytest.raises(CheckpointError, match="EMA"):
        load_diffusers(folder, ema=False)
    change(folder / "ldm.json", format="ldm-diffusers/9")
    with pytest.raises(CheckpointError, match="ldm-diffusers/9"):
        load_diffusers(folder)


def change_tensors(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("scale", [None, [1.0], ["a", 1.0, 1.0]])
def test_a_damaged_note_is_named(scale, exported):
    _, folder = exported("kl-class-tokens")
    change(folder / "ldm.json", latent_scale=scale)
    with pytest.raises(CorruptCheckpoint, match="latent_scale"):
        load_diffusers(folder)


def test_missing_keys_of_the_conditioner_fail(exported):
    _, folder = exported("kl-class-tokens")
    change_tensors(folder / "conditioner" / "model.safetensors", lambda t: t.update(x=torch.zeros(1)))
    with pytest.raises(KeyMismatch, match=r"conditioner\.x"):
        load_diffusers(folder)
    (folder / "conditioner" / "model.safetensors").unlink()
    with pytest.raises(KeyMismatch, match="embedding.weight"):
        load_diffusers(folder)


def test_the_table_of_classes_is_the_function_that_it_stands_for(exported):
    model, folder = exported("kl-class-vector-flow")
    table = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["class_embedding.weight"]
    assert relative_error(table, class_table(model)) < 1e-5
    assert len(table) == 4  # the last row: no class
    with torch.no_grad():
        absent = model.network.label_emb(model.conditioner.unconditional(1)["vector"])
    assert relative_error(table[3], absent[0]) < 1e-5


@pytest.mark.parametrize(
    "edit", [lambda t: t["class_embedding.weight"].add_(1), lambda t: t.pop("class_embedding.weight")]
)
def test_a_changed_table_of_classes_is_refused(exported, edit):
    _, folder = exported("kl-class-vector-flow")
    change_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", edit)
    with pytest.raises(CheckpointError, match="class_embedding"):
        load_diffusers(folder)


def test_models_without_a_description_are_written_without_a_note(tmp_path):
    model = build("vq-unconditional")
    del model.description
    save_diffusers(model, tmp_path / "out")
    assert not (tmp_path / "out" / "ldm.json").exists()
    assert same_weights(load_diffusers(tmp_path / "out"), model)


def test_a_lone_part_of_an_export_is_read(exported):
    model, folder = exported("kl-class-tokens")
    assert same_weights(load_diffusers(folder / "unet"), model.network)
    assert same_weights(load_diffusers(folder / "vae"), model.first_stage_model)


@pytest.mark.parametrize("name", ["vq-unconditional", "kl-class-vector-flow"])
def test_half_precision_is_kept_in_the_file(name, tmp_path):
    model = build(name).to(torch.bfloat16)
    save_diffusers(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = load_diffusers(tmp_path / "out")
    assert same_weights(again.network.to(torch.bfloat16), model.network)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from ldm.checkpoints.diffusers import export as diffusers_export

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(diffusers_export, "write_safetensors", full)
    with pytest.raises(OSError, match="no space"):
        save_diffusers(build("vq-unconditional"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_odd_size_is_written_and_read(tmp_path):
    model = build("pixels-learned-variance")
    params = {"first_stage": model.first_stage_model, "network": model.network, "denoiser": model.denoiser}
    wide = LatentDiffusion(**params, image_size=[16, 24]).eval()
    save_diffusers(wide, tmp_path / "out")
    assert config(tmp_path / "out" / "unet")["sample_size"] == [16, 24]
