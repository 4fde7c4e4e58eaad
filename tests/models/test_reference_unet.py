"""UNetModel against the outputs of the original implementations (tests/reference), filled strictly."""

import pytest
import torch
from reference_data import filled, load_cases, load_config, load_keys, relative_error

from ldm.models.unet import UNetModel

TOLERANCE = 1e-5


def fill_strictly(model: torch.nn.Module, keys: dict[str, list[int]], prefix: str = "") -> None:
    """Load the reference weights; names and shapes must be exactly those under `prefix`."""
    expected = {name.removeprefix(prefix): shape for name, shape in keys.items() if name.startswith(prefix)}
    assert {name: list(p.shape) for name, p in model.state_dict().items()} == expected
    model.load_state_dict({name: filled(prefix + name, tuple(shape)) for name, shape in expected.items()})
    model.eval()


@pytest.mark.parametrize(
    "folder", ["sgm-unet-sd2", "sgm-unet-sdxl", "adm-unet-learned-sigma", "adm-unet-new-order"]
)
def test_unet_matches_the_reference(folder):
    cases = load_cases(folder)
    model = UNetModel(**load_config(folder)["params"])
    fill_strictly(model, load_keys(folder))
    with torch.no_grad():
        output = model(cases["x"], cases["timesteps"], context=cases.get("context"), y=cases.get("y"))
    assert relative_error(output, cases["output"]) < TOLERANCE


@pytest.mark.parametrize("folder", ["compvis-ldm-class", "compvis-ldm-unconditional"])
def test_unet_of_a_latent_diffusion_model_matches_the_reference(folder):
    cases, keys = load_cases(folder), load_keys(folder)
    model = UNetModel(**load_config(folder)["model"]["params"]["unet_config"]["params"])
    fill_strictly(model, keys, prefix="model.diffusion_model.")
    context = None
    if "labels" in cases:
        name = "cond_stage_model.embedding.weight"
        context = filled(name, tuple(keys[name]))[cases["labels"]][:, None]  # (B, 1, D)
        assert torch.equal(context, cases["context"])
    with torch.no_grad():
        output = model(cases["latent"], cases["timesteps"], context=context)
    assert relative_error(output, cases["denoised_output"]) < TOLERANCE


def test_the_head_layout_matters():
    """The legacy layout on weights of the new one gives something else: the comparison can fail."""
    folder = "adm-unet-new-order"
    cases = load_cases(folder)
    model = UNetModel(**load_config(folder)["params"] | {"use_new_attention_order": False})
    fill_strictly(model, load_keys(folder))
    with torch.no_grad():
        output = model(cases["x"], cases["timesteps"])
    assert relative_error(output, cases["output"]) > 1e-2


# Sizes as published: SD 1, SD 2.1, SDXL base and refiner (generative-models), ADM 256 (Dhariwal & Nichol,
# table 4, 554 M); parameters in millions.
SD = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "channel_mult": (1, 2, 4, 4),
}
SD["attention_resolutions"] = (4, 2, 1)
SD2 = {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}
SDXL = SD | SD2 | {"channel_mult": (1, 2, 4), "attention_resolutions": (4, 2), "context_dim": 2048}
SDXL |= {"transformer_depth": (1, 2, 10), "num_classes": "sequential", "adm_in_channels": 2816}
REFINER = SDXL | {"model_channels": 384, "channel_mult": (1, 2, 4, 4), "context_dim": [1280] * 4}
REFINER |= {"transformer_depth": 4, "adm_in_channels": 2560}
ADM = {"in_channels": 3, "out_channels": 6, "model_channels": 256, "num_res_blocks": 2, "num_classes": 1000}
ADM |= {"channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 16, 32), "num_head_channels": 64}
ADM |= {"use_scale_shift_norm": True, "resblock_updown": True}


@pytest.mark.parametrize(
    "arguments, millions",
    [
        (SD | {"num_heads": 8, "context_dim": 768}, "859.5"),
        (SD | SD2, "865.9"),
        (SDXL, "2567.5"),
        (REFINER, "2259.5"),
        (ADM, "553.8"),
    ],
    ids=["sd1", "sd2", "sdxl", "refiner", "adm256"],
)
def test_published_sizes(arguments, millions):
    with torch.device("meta"):
        model = UNetModel(**arguments)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions
