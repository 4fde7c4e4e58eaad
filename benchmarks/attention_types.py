"""What each `attn_type` of the autoencoder costs, and what it gains in reconstruction on one short run.

    python benchmarks/attention_types.py costs
    python benchmarks/attention_types.py reconstruction [--steps 300] [--seeds 0,1,2]

An f4 KL autoencoder for 64x64 emoji with attention at its lowest resolution, 16x16: after every block of that
level, and in the middle, of encoder and decoder alike; five places. `costs` needs a quiet machine, and times
the types in turn, so that what disturbs one disturbs all; `reconstruction` trains each type with `train.py`
on the same images in the same order, and reads what the run measured on held-out emoji. Prints Markdown.
"""

import argparse
import csv
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from quickstart import ROOT, processor
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import instantiate
from ldm.training.run_config import load_run

TYPES = "none", "vanilla", "linear", "se", "cbam", "eca"
CONFIG = "configs/quickstart/autoencoder.yaml"
NETWORK = "model.params.ddconfig"
BATCH = 16
OVERRIDES = (
    "data.target=ldm.data.Emoji",
    "data.params.size=64",
    "data.params.channels=3",
    "data.params.validation=200",
    f"{NETWORK}.resolution=64",
    f"{NETWORK}.in_channels=3",
    f"{NETWORK}.out_ch=3",
    f"{NETWORK}.ch=16",
    f"{NETWORK}.ch_mult=[1,2,4]",
    f"{NETWORK}.attn_resolutions=[16]",
    f"training.batch_size={BATCH}",
    "training.optimizer.lr=1e-3",
    "training.ema=null",  # such short runs have no past to average
)


def overrides(attn_type: str) -> list[str]:
    return [*OVERRIDES, f"{NETWORK}.attn_type={attn_type}"]


def build(attn_type: str) -> torch.nn.Module:
    torch.manual_seed(0)
    cfg, _ = load_run(ROOT / CONFIG, overrides(attn_type))
    return instantiate(cfg.model)


def reconstruct(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.decode(model.encode(images).mode())


def milliseconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    began = time.perf_counter()
    reconstruct(model, images).square().mean().backward()
    return 1e3 * (time.perf_counter() - began)


def costs(rounds: int) -> None:
    """Parameters, FLOPs and time of each type."""
    images = torch.randn(BATCH, 3, 64, 64)
    models = {name: build(name) for name in TYPES}
    times = {name: [] for name in TYPES}
    for round_number in range(-2, rounds):
        for name, model in models.items():
            spent = milliseconds(model, images)
            if round_number >= 0:  # the first ones warm up
                times[name].append(spent)
    print("| `attn_type` | parameters | MFLOPs an image, forward | ms a step, forward and backward | ratio |")
    print("|---|---|---|---|---|")
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            reconstruct(model, images)
        parameters = sum(p.numel() for p in model.parameters())
        flops = counter.get_total_flops() / BATCH / 1e6
        median = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[name], times["none"], strict=True))
        print(f"| {name} | {parameters:,} | {flops:.1f} | {median:.0f} | {ratio:.2f} |")


def reconstruction(steps: int, seeds: list[int]) -> None:
    """PSNR and L1 on held-out images after a short run, one run a seed."""
    print("| `attn_type` | PSNR in dB, median of the seeds | each seed | L1, median |")
    print("|---|---|---|---|")
    for name in TYPES:
        results = [train(name, steps, seed) for seed in seeds]
        psnr = [float(result["psnr"]) for result in results]
        l1 = statistics.median(float(result["l1"]) for result in results)
        each = ", ".join(f"{value:.2f}" for value in psnr)
        print(f"| {name} | {statistics.median(psnr):.2f} | {each} | {l1:.4f} |", flush=True)


def train(attn_type: str, steps: int, seed: int) -> dict[str, str]:
    """The last row of the run's validation.csv."""
    with tempfile.TemporaryDirectory() as runs:
        settings = [f"runs={runs}", "name=run", f"seed={seed}", f"training.steps={steps}"]
        settings += [f"logging.{what}_every={steps}" for what in ("images", "validate")]
        settings += [f"training.checkpoint_every={steps}"]
        command = [sys.executable, "train.py", CONFIG, *overrides(attn_type), *settings]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        with (Path(runs) / "run" / "logs" / "validation.csv").open() as file:
            return list(csv.DictReader(file))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("costs")
    timing.add_argument("--rounds", type=int, default=20)
    runs = commands.add_parser("reconstruction")
    runs.add_argument("--steps", type=int, default=300)
    runs.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}; {datetime.date.today()}\n")
    if given.command == "costs":
        costs(given.rounds)
    else:
        reconstruction(given.steps, [int(seed) for seed in given.seeds.split(",")])


if __name__ == "__main__":
    main()
