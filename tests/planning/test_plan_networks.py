"""`ldm plan` of a YAML that describes no run: a published model's, or that of a network alone."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from published_configs import STABLE_DIFFUSION
from reference_data import ROOT as REFERENCE
from reference_data import load_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoints.originals.original_yaml import read_original
from ldm.checkpoints.originals.published import translate
from ldm.config import ConfigError, instantiate
from ldm.planning.planned import GIB, PlanRequest, make_plan
from ldm.planning.report import report

ROOT = Path(__file__).parents[2]
TIMES = torch.tensor([3.0])
DIT = {"size": "DiT-S/4", "depth": 2, "num_classes": 10, "learn_sigma": True, "input_size": [16, 8]}
VIT = {"size": "vit_base_patch32_224", "depth": 1, "num_classes": 3}
UNET = dict(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
    attention_resolutions=[1, 2], num_heads=4, image_size=16,
)  # fmt: skip

# name -> (YAML, inputs that its network takes)
NETWORKS = {
    "dit": (
        {"target": "ldm.models.dit.DiT", "params": DIT},
        lambda: {"x": torch.rand(1, 4, 16, 8), "timesteps": TIMES, "y": torch.tensor([3])},
    ),
    "vit": (
        {"target": "ldm.models.vit.VisionTransformer", "params": VIT},
        lambda: {"x": torch.rand(1, 3, 224, 224)},
    ),
    "unet": (
        {"target": "ldm.models.unet.UNetModel", "params": UNET},
        lambda: {"x": torch.rand(1, 4, 16, 16), "timesteps": TIMES},
    ),
    "autoencoder": (
        load_config("compvis-autoencoder-kl"),
        lambda: {"x": torch.rand(1, 3, 32, 32)},
    ),
    "noisy-classifier": (
        load_config("adm-classifier-attention"),
        lambda: {"x": torch.rand(1, 3, 16, 16), "timesteps": TIMES},
    ),
}


def written(folder: Path, tree: dict) -> Path:
    path = folder / "some-network.yaml"
    path.write_text(yaml.safe_dump(copy.deepcopy(tree)))
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_flops_are_those_of_the_network(tmp_path, name):
    tree, inputs = NETWORKS[name]
    path = written(tmp_path, tree)
    plan = make_plan(path)
    network = instantiate(translate(read_original(path)).node).eval()
    counts = [sum(p.numel() for p in part.parameters()) for part in (plan.work.parts["network"], network)]
    assert counts[0] == counts[1] == sum(p.numel() for p in plan.work.trained)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**inputs())
    assert plan.cost.forward == counter.get_total_flops() > 0
    assert 2.5 < plan.cost.flops / plan.cost.forward < 3.5
    shown = report(plan)
    assert "some-network" in shown and "1,000,000 images is assumed" in shown and "nan" not in shown
    assert plan.memory.total(plan.largest) <= plan.request.memory * GIB < plan.memory.total(plan.largest + 1)


def test_a_whole_published_model():
    path = REFERENCE / "compvis-ldm-class" / "config.yaml"
    plan = make_plan(path)
    assert list(plan.work.parts) == ["network", "conditioner", "first stage"]
    assert "input of the network 3x8x8" in plan.work.title
    assert {id(p) for p in plan.work.trained} == {id(p) for p in plan.work.parts["network"].parameters()}
    assert not any(p.requires_grad for p in plan.work.parts["conditioner"].parameters())
    larger = make_plan(path, [], PlanRequest(size=32))
    assert "input of the network 3x16x16" in larger.work.title and larger.cost.forward > 3 * plan.cost.forward
    with pytest.raises(ValueError, match="17x17 pixels are no multiple of the first stage's factor 2"):
        make_plan(path, [], PlanRequest(size=17))


def test_stable_diffusion_is_planned_from_its_own_yaml(tmp_path):
    """859.5 million parameters, and the 0.8 TFLOPs of a forward pass that are quoted for 64x64 latents."""
    plan = make_plan(written(tmp_path, {"model": STABLE_DIFFUSION["stable-diffusion/v1-inference"]}))
    assert sum(p.numel() for p in plan.work.parts["network"].parameters()) == 859_520_964
    assert 0.75e12 < plan.cost.forward < 0.85e12


def test_the_yaml_can_be_changed(tmp_path):
    path = written(tmp_path, NETWORKS["dit"][0])
    plan = make_plan(path, ["params.depth=4", "training.batch_size=32", "training.steps=50"])
    assert plan.images == 1600 and "assumed" not in report(plan)
    assert len(plan.work.parts["network"].blocks) == 4
    with pytest.raises(ConfigError, match="training.stepz"):
        make_plan(path, ["training.stepz=3"])
    with pytest.raises(ConfigError, match="hidden_size"):
        make_plan(path, ["params.hiden_size=3"])


def test_the_size_has_to_come_from_somewhere(tmp_path):
    unknown = {"target": NETWORKS["unet"][0]["target"], "params": {**UNET, "image_size": None}}
    path = written(tmp_path, unknown)
    with pytest.raises(ValueError, match="how large the network's input is; give its side as --size"):
        make_plan(path)
    assert make_plan(path, [], PlanRequest(size=16)).cost.forward == make_plan(
        written(tmp_path, NETWORKS["unet"][0])
    ).cost.forward  # fmt: skip
    path = written(tmp_path, {"target": "ldm.nn.attention.AttnBlock", "params": {"in_channels": 32}})
    with pytest.raises(ValueError, match="AttnBlock is planned by the config of its run alone"):
        make_plan(path)


def test_neither_run_nor_model_is_told(tmp_path):
    with pytest.raises(ConfigError, match="task: must be one of autoencoder, diffusion, classifier"):
        make_plan(written(tmp_path, {"learning_rate": 3}))


def test_the_classes_of_embedded_data_are_known():
    path = ROOT / "configs" / "classifier" / "vit.yaml"
    plan = make_plan(path)
    assert plan.work.parts["classifier"].num_classes == 10 and plan.work.notes == []
    assert make_plan(path, [], PlanRequest(classes=7)).work.parts["classifier"].num_classes == 7
