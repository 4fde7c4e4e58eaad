"""`ldm plan`: what a run would need, held against networks that are really built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from published_files import lightning_checkpoint, weights_of
from reference_data import ROOT as REFERENCE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import instantiate
from ldm.planning.planned import GIB, PlanRequest, make_plan
from ldm.planning.report import report
from ldm.training.run_config import load_run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
QUICKSTART = ROOT / "configs" / "quickstart"


def given(path: Path) -> list[str]:
    """A first stage for the configs that leave it open."""
    text = path.read_text() + "".join(p.read_text() for p in path.parent.glob("*-f8.yaml"))
    stage = f"first_stage={ROOT / 'configs' / 'autoencoder' / 'kl-f8.yaml'}"
    return [stage] if path.parent.name == "diffusion" and "first_stage" in text else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_has_a_plan(path):
    plan = make_plan(path, given(path))
    assert plan.cost.forward > 0 and plan.hours > 0
    # A backward pass is about twice the forward one; checkpointing adds a forward, an adversary its own.
    # Without cached latents the first stage's encoder, larger than the network, goes through every batch.
    encodes = "first stage" in plan.work.parts and not any("are cached" in note for note in plan.work.notes)
    assert 2.5 < plan.cost.flops / plan.cost.forward < (16 if encodes else 7)
    shown = report(plan)
    assert repr(yaml.safe_load(path.read_text())["name"]) in shown and "nan" not in shown


def test_parameters_and_flops_are_those_of_the_network():
    pixels = ["first_stage=null", "network.params.in_channels=1", "network.params.out_channels=1"]
    plan = make_plan(QUICKSTART / "diffusion.yaml", pixels)
    cfg, _ = load_run(QUICKSTART / "diffusion.yaml", pixels)
    network = instantiate(cfg.network)
    assert sum(p.numel() for p in plan.work.parts["network"].parameters()) == sum(
        p.numel() for p in network.parameters()
    )
    # torch counts no fused attention on the CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 1, 32, 32), torch.zeros(1), y=torch.zeros(1, 64))
    assert plan.cost.forward == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_the_largest_batch_fills_the_memory():
    plan = make_plan(
        ROOT / "configs/diffusion/dit-s-f8.yaml", given(ROOT / "configs/diffusion/dit-s-f8.yaml")
    )
    assert plan.memory.total(plan.largest) <= plan.request.memory * GIB < plan.memory.total(plan.largest + 1)


def test_checkpointing_trades_memory_for_work():
    path = ROOT / "configs/diffusion/dit-s-f8.yaml"
    plain, checkpointed = (
        make_plan(path, [*given(path), f"network.params.use_checkpoint={switch}"]) for switch in (False, True)
    )
    assert checkpointed.cost.flops == pytest.approx(plain.cost.flops * 4 / 3, rel=0.02)
    assert checkpointed.largest > 2 * plain.largest


def test_time_follows_from_work_and_machine():
    path = QUICKSTART / "autoencoder.yaml"
    slow = make_plan(path, [], PlanRequest(tflops=100, utilisation=0.2))
    fast = make_plan(path, ["training.devices=2"], PlanRequest(tflops=100, utilisation=0.4))
    assert slow.hours == pytest.approx(4 * fast.hours)
    images = slow.work.training.steps * slow.work.training.batch_size
    assert slow.hours == pytest.approx(images * slow.cost.flops / 20e12 / 3600)


def test_a_published_autoencoder_may_be_the_first_stage(tmp_path):
    folder = "compvis-autoencoder-kl"
    path = lightning_checkpoint(tmp_path / "model.ckpt", weights_of(folder))
    config = REFERENCE / folder / "config.yaml"
    overrides = [f"first_stage={path}", f"first_stage_config={config}", "data.params.size=32"]
    plan = make_plan(ROOT / "configs/diffusion/class-unet-f8.yaml", overrides)
    first_stage = sum(p.numel() for p in plan.work.parts["first stage"].parameters())
    assert first_stage == sum(w.numel() for w in weights_of(folder).values())


# The command


def plan(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from ldm.cli import main; main()", "plan", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_command_prints_the_plan():
    done = plan(QUICKSTART / "autoencoder.yaml", "--memory", "24", "--tflops", "165")
    assert done.returncode == 0, done.stderr
    for word in (
        "parameters",
        "GFLOPs",
        "kept MiB",
        "largest batch at once in 24 GiB",
        "at 40% of 165 TFLOP/s",
    ):
        assert word in done.stdout


def test_a_small_memory_holds_nothing():
    path = ROOT / "configs/diffusion/dit-xl-f8.yaml"
    done = plan(path, *given(path), "--memory", "4")
    assert done.returncode == 0 and "4 GiB do not hold a single image" in done.stdout


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["training.stepz=3"], "did you mean training.steps?"),
        (["network.params.hiden_size=3"], "did you mean hidden_size?"),
        (["--utilisation", "0"], "must be above 0"),
    ],
)
def test_mistakes_are_told(arguments, told):
    path = ROOT / "configs/diffusion/dit-s-f8.yaml"
    done = plan(path, *given(path), *arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert told in done.stderr
