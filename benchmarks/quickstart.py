"""Times the quickstart's three commands and counts how many of its digits come out right.

    python benchmarks/quickstart.py [--seed 0] [--network YAML] [--keep FOLDER]

`--network`, such as configs/quickstart/diffusion-dit.yaml, puts another network in the place of the UNet.
Everything is written to a temporary folder, or to the one to keep. Prints a table with machine and date.
"""

import argparse
import contextlib
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor()


def timed(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", help="a YAML whose network takes the UNet's place")
    parser.add_argument("--keep", type=Path, help="a folder for the runs and samples, which must be new")
    given = parser.parse_args()
    seed, network = given.seed, [f"network={given.network}"] if given.network else []
    if given.keep is not None:
        given.keep.mkdir(parents=True)
    with contextlib.nullcontext(given.keep) if given.keep else tempfile.TemporaryDirectory() as folder:
        runs, out = f"runs={folder}/runs", f"{folder}/out"
        shared = (runs, f"seed={seed}")
        first_stage = f"first_stage={folder}/runs/quickstart-autoencoder"
        run = f"{folder}/runs/quickstart-diffusion"
        seconds = {
            "autoencoder": timed("train.py", "configs/quickstart/autoencoder.yaml", *shared),
            "diffusion": timed(
                "train.py", "configs/quickstart/diffusion.yaml", *shared, *network, first_stage
            ),
            "sampling": timed("sample.py", run, "--classes=0-9", "--n=10", f"--seed={seed}", f"--out={out}"),
        }
        check = [sys.executable, "benchmarks/digits_accuracy.py", out]
        accuracy = subprocess.run(check, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    print(f"machine: {device}, {os.cpu_count()} cores; torch {torch.__version__}; {datetime.date.today()}")
    print(f"seed {seed}{', network of ' + given.network if given.network else ''}")
    for name, value in seconds.items():
        print(f"{name:12s} {value:6.0f} s")
    print(f"{'together':12s} {sum(seconds.values()):6.0f} s")
    print(accuracy, end="")


if __name__ == "__main__":
    main()
