"""The YAMLs of the original projects: what they build, parameter for parameter, and what they may not say."""

import functools
import hashlib
import json
import math

import pytest
import torch
from published_configs import CONFIGS, SGM, STABLE_DIFFUSION
from published_files import write_config
from reference_data import ROOT, load_config

from ldm.checkpoints.originals.original_yaml import read_original
from ldm.checkpoints.originals.published import build_empty, translate
from ldm.config import ConfigError

PUBLISHED = CONFIGS | STABLE_DIFFUSION | SGM
LISTS = json.loads((ROOT / "published-lists" / "lists.json").read_text())


def built(config):
    original = read_original(config)
    translated = translate(original)
    model = build_empty(translated)
    return model, translated.view(model), original.reading.notes


@functools.cache  # several published YAMLs say the same
def published(tree: str):
    model, view, _ = built({"model": json.loads(tree)})
    return model, view


def summary(shapes: dict[str, tuple[int, ...]]) -> dict:
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    return {
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def test_all_published_models_of_latent_diffusion_are_here():
    assert len(CONFIGS) == 32 and set(CONFIGS | STABLE_DIFFUSION) <= set(LISTS)


def test_parameter_lists_equal_the_originals():
    """Names and shapes of every model, against lists that the original projects' own classes gave."""
    for name, tree in PUBLISHED.items():
        model, view = published(json.dumps(tree))
        shapes = {key: tuple(value.shape) for key, value in view.state_dict().items()}
        by_std = tree["params"].get("scale_by_std", False)
        assert ("scale_factor" in shapes) == by_std
        shapes.pop("scale_factor", None)
        if name in LISTS:
            assert summary(shapes) == LISTS[name], name
        assert all(parameter.is_meta for parameter in model.parameters())


# Millions, as their papers, model cards and repositories give them.
PUBLISHED_COUNTS = {
    "configs/latent-diffusion/cin256-v2": {"model": "400.9", "cond_stage_model": "0.5"},
    "models/ldm/celeba256/config": {"model": "274.1"},
    "models/ldm/lsun_churches256/config": {"model": "295.0"},
    "configs/latent-diffusion/txt2img-1p4B-eval": {"model": "872.3", "cond_stage_model": "582.0"},
    "stable-diffusion/v1-inference": {
        "model": "859.5",
        "first_stage_model": "83.7",
        "cond_stage_model": "123.1",
    },
    "stable-diffusion/v2-inference-v": {"model": "865.9", "cond_stage_model": "354.0"},
    "configs/inference/sd_2_1": {"model": "865.9", "conditioner": "354.0"},
    "configs/inference/sd_xl_base": {"model": "2567.5", "conditioner": "817.7"},
    "configs/inference/sd_xl_refiner": {"model": "2259.5", "conditioner": "694.7"},
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_sizes(name):
    _, view = published(json.dumps(PUBLISHED[name]))
    for part, millions in PUBLISHED_COUNTS[name].items():
        count = sum(parameter.numel() for parameter in getattr(view, part).parameters())
        assert f"{count / 1e6:.1f}" == millions, part


@pytest.mark.parametrize(
    "name, image_size, latent, scale, prediction",
    [
        ("configs/latent-diffusion/cin256-v2", 256, (3, 64, 64), 1.0, "eps"),
        ("configs/retrieval-augmented-diffusion/768x768", 768, (16, 48, 48), 0.22765929, "eps"),
        ("models/ldm/semantic_synthesis512/config", 512, (3, 128, 128), 1.0, "eps"),
        ("stable-diffusion/v1-inference", 512, (4, 64, 64), 0.18215, "eps"),
        ("stable-diffusion/v2-inference-v", 512, (4, 64, 64), 0.18215, "v"),
        ("configs/inference/sd_2_1_768", 768, (4, 96, 96), 0.18215, "v"),
        ("configs/inference/sd_xl_base", 1024, (4, 128, 128), 0.13025, "eps"),
    ],
)
def test_what_the_models_are(name, image_size, latent, scale, prediction):
    model, _ = published(json.dumps(PUBLISHED[name]))
    assert model.image_size == (image_size, image_size) and model.latent_shape == latent
    assert model.latent_scale.flatten().tolist() == pytest.approx([scale] * latent[0])
    assert model.denoiser.prediction == prediction and not model.training
    schedule = model.denoiser.schedule
    params = PUBLISHED[name]["params"]
    start, end = params.get("linear_start", 0.00085), params.get("linear_end", 0.012)
    assert schedule.betas[[0, -1]].tolist() == pytest.approx([start, end])


KINDS = {
    "models/ldm/celeba256/config": [],
    "models/ldm/bsr_sr/config": [("LR_image", "concat")],
    "models/ldm/inpainting_big/config": [("masked_image", "concat"), ("mask", "concat")],
    "models/ldm/semantic_synthesis256/config": [("segmentation", "concat")],
    "models/ldm/layout2img-openimages256/config": [("coordinates_bbox", "crossattn")],
    "models/ldm/cin256/config": [("label", "crossattn")],
    "configs/retrieval-augmented-diffusion/768x768": [("nix", "crossattn")],
    "stable-diffusion/v1-inpainting-inference": [
        ("txt", "crossattn"),
        ("mask", "concat"),
        ("masked_image", "concat"),
    ],
}


@pytest.mark.parametrize("name", KINDS)
def test_conditions(name):
    model, _ = published(json.dumps(PUBLISHED[name]))
    assert [(embedder.key, embedder.kind) for embedder in model.conditioner.embedders] == KINDS[name]


def test_adm_condition_is_a_vector():
    tree = load_config("compvis-ldm-class")
    params = tree["model"]["params"]
    params["conditioning_key"] = "adm"
    unet = params["unet_config"]["params"]
    del unet["context_dim"], unet["use_spatial_transformer"], unet["transformer_depth"]
    unet |= {"num_classes": 10}
    params["cond_stage_config"] = {"target": "torch.nn.Identity"}
    params["cond_stage_key"] = "cls"
    model, _, _ = built(tree)
    labels = torch.tensor([3, 4])
    assert torch.equal(model.conditioner({"cls": labels})["vector"], labels)


def test_the_rest_of_a_yaml_is_noted_and_not_read(tmp_path):
    tree = load_config("compvis-ldm-class")
    tree["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = "CKPT_PATH"
    tree["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {
            "train": {
                "target": "ldm.data.openimages.FullOpenImagesTrain",
                "params": {"root": "${nowhere.to.be.found}"},
            },
            "urls": ["DATA_PATH"],
        },
    }
    tree["lightning"] = {"trainer": {"benchmark": True}}
    _, _, notes = built(write_config(tmp_path / "config.yaml", tree))
    text = "\n".join(notes)
    assert (
        "CKPT_PATH" in text
        and "ldm.data.openimages.FullOpenImagesTrain" in text
        and "lightning: not read" in text
    )


def test_references_are_to_the_whole_file(tmp_path):
    tree = load_config("compvis-ldm-class")
    params = tree["model"]["params"]
    tree["shared"] = {"dd": params["first_stage_config"]["params"].pop("ddconfig")}
    params["first_stage_config"]["params"]["ddconfig"] = "${shared.dd}"
    params["unet_config"]["params"]["image_size"] = "${model.params.image_size}"
    model, _, _ = built(write_config(tmp_path / "config.yaml", tree))
    assert model.first_stage_model.downsampling_factor == 2
    with pytest.raises(ConfigError, match="shared.*give the whole"):
        built(write_config(tmp_path / "part.yaml", {"model": tree["model"]}))


def mistakes(change) -> list[str]:
    tree = load_config("compvis-ldm-class")
    change(tree["model"]["params"])
    with pytest.raises(ConfigError) as error:
        built(tree)
    return error.value.problems


def test_unknown_parameters_are_listed_with_their_places():
    def change(params):
        params["linear_strat"] = 1
        params["unet_config"]["params"]["chanel_mult"] = [1]
        params["first_stage_config"]["params"]["ddconfig"]["chh"] = 3
        params["cond_stage_config"]["params"]["n_clases"] = 3

    found = mistakes(change)
    assert len(found) == 3
    assert any("model.params.linear_strat: unknown; did you mean linear_start?" in line for line in found)
    assert any(
        "model.params.unet_config.params.chanel_mult: unknown; did you mean channel_mult?" in x for x in found
    )
    assert any("model.params.cond_stage_config.params.n_clases: unknown" in line for line in found)
    tree = load_config("compvis-ldm-class")
    tree["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["chh"] = 3
    with pytest.raises(ConfigError, match="ddconfig.chh is not known.*did you mean ch"):
        built(tree)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p["unet_config"].update(target="os.system"), "'os.system' is no known network"),
        (
            lambda p: p["cond_stage_config"].update(target="ldm.modules.encoders.modules.ClasEmbedder"),
            "did you mean ldm.modules.encoders.modules.ClassEmbedder?",
        ),
        (lambda p: p.update(parameterization="mu"), "model.params.parameterization: is 'mu'"),
        (lambda p: p.update(conditioning_key="hybrid-adm"), "model.params.conditioning_key"),
        (lambda p: p.update(v_posterior=0.5), "model.params.v_posterior"),
        (lambda p: p.pop("unet_config"), "needs unet_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, words):
    assert any(words in line for line in mistakes(change))


@pytest.mark.parametrize(
    "config, words",
    [
        ({"models": {}}, "neither `model:` nor `target:`"),
        ({"model": {"params": {}}}, "expected a mapping with a target"),
        (
            {"target": "sgm.models.diffusion.DifusionEngine"},
            "did you mean sgm.models.diffusion.DiffusionEngine",
        ),
        ({"model": {"target": "ldm.training.method.Method"}}, "no known model"),
    ],
)
def test_what_is_no_model(config, words):
    with pytest.raises(ConfigError, match=words):
        built(config)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "config.yaml").write_text("model:")
    with pytest.raises(ConfigError, match="did you mean config.yaml"):
        built(tmp_path / "confg.yaml")
    (tmp_path / "broken.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        built(tmp_path / "broken.yaml")


# sgm's denoisers and first stages


def engine(**params):
    tree = json.loads(json.dumps(SGM["configs/inference/sd_2_1"]))
    tree["params"] |= params
    return {"model": tree}


def test_edm_denoiser():
    modules = "sgm.modules.diffusionmodules."
    scaling = {"target": modules + "denoiser_scaling.EDMScaling", "params": {"sigma_data": 1.0}}
    unet = {
        "in_channels": 1,
        "out_channels": 1,
        "model_channels": 32,
        "attention_resolutions": [],
        "num_res_blocks": 4,
        "channel_mult": [1, 2, 2],
        "num_head_channels": 32,
        "num_classes": "sequential",
        "adm_in_channels": 128,
    }
    embedder = {
        "is_trainable": True,
        "input_key": "cls",
        "ucg_rate": 0.2,
        "target": "sgm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 128, "n_classes": 10},
    }
    model, _, _ = built(
        engine(
            scale_factor=1.0,
            denoiser_config={"target": modules + "denoiser.Denoiser", "params": {"scaling_config": scaling}},
            network_config={"target": modules + "openaimodel.UNetModel", "params": unet},
            conditioner_config={
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": [embedder]},
            },
            first_stage_config={"target": "sgm.models.autoencoder.IdentityFirstStage"},
            sampler_config={
                "target": modules + "sampling.EulerEDMSampler",
                "params": {
                    "num_steps": 50,
                    "discretization_config": {
                        "target": modules + "discretizer.EDMDiscretization",
                        "params": {"sigma_max": 40.0},
                    },
                },
            },
        )
    )
    assert model.denoiser.prediction == "edm" and model.denoiser.sigma_data == 1.0
    assert (model.denoiser.schedule.sigma_min, model.denoiser.schedule.sigma_max) == (0.002, 40.0)
    assert model.first_stage_model.image_channels == 1
    assert model.conditioner.embedders[0].drop == 0.2
    # sgm's middle block is a SpatialTransformer even without a context
    assert hasattr(model.network.middle_block[1], "transformer_blocks")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d["params"].update(num_idx=500), "num_idx: is 500"),
        (lambda d: d["params"].update(quantize_c_noise=False), "quantize_c_noise"),
        (
            lambda d: d["params"]["scaling_config"].update(
                target="sgm.modules.diffusionmodules.denoiser_scaling.VScalingWithEDMcNoise"
            ),
            "VScalingWithEDMcNoise.*not supported",
        ),
        (
            lambda d: d["params"]["discretization_config"].update(
                target="sgm.modules.diffusionmodules.discretizer.EDMDiscretization"
            ),
            "EDMDiscretization.*not supported",
        ),
    ],
)
def test_denoisers_that_are_not_supported(change, words):
    tree = engine()
    change(tree["model"]["params"]["denoiser_config"])
    with pytest.raises(ConfigError, match=words):
        built(tree)


def autoencoding_engine(regularizer, double_z, **params) -> dict:
    dd = load_config("compvis-autoencoder-kl")["model"]["params"]["ddconfig"] | {"double_z": double_z}
    modules = "sgm.modules.diffusionmodules.model."
    return {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": "sgm.models.autoencoder.AutoencodingEngine",
            "params": {
                "input_key": "jpg",
                "monitor": "val/rec_loss",
                "loss_config": {"target": "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator"},
                "regularizer_config": {
                    "target": "sgm.modules.autoencoding.regularizers." + regularizer,
                    "params": params,
                },
                "encoder_config": {"target": modules + "Encoder", "params": dd},
                "decoder_config": {
                    "target": modules + "Decoder",
                    "params": "${model.params.encoder_config.params}",
                },
            },
        }
    }


def test_autoencoding_engine_has_no_quant_convolutions():
    _, view, _ = built(autoencoding_engine("DiagonalGaussianRegularizer", True))
    names = set(dict(view.named_parameters()))
    _, with_them, _ = built(load_config("compvis-autoencoder-kl"))
    quant = {f"{part}.{kind}" for part in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias")}
    assert names == set(dict(with_them.named_parameters())) - quant
    _, view, _ = built(autoencoding_engine("quantize.VectorQuantizer", False, n_e=64, e_dim=4))
    codebook = dict(view.named_parameters())["regularization.embedding.weight"]
    assert codebook.shape == (64, 4) and "quantize.embedding.weight" not in dict(view.named_parameters())
