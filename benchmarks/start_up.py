"""How long a user waits for a help text, an import, or the message about a mistake.

    python benchmarks/start_up.py [CHECKOUT] [--runs 9]

Each command is a process of its own, started in CHECKOUT (this one by default). All commands are timed in
turn, so that what disturbs one disturbs all; a first turn that fills the caches is not counted. Prints
Markdown: the median and the range of the wall-clock time.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from quickstart import ROOT, processor

CONFIG = "configs/quickstart/autoencoder.yaml"
#: What the table says -> arguments of Python, and the exit status that belongs to it.
COMMANDS = {
    "`sample.py --help`": (["sample.py", "--help"], 0),
    "`train.py --help`": (["train.py", "--help"], 0),
    "`python -m ldm --help`": (["-m", "ldm", "--help"], 0),
    "`import ldm`": (["-c", "import ldm"], 0),
    "a mistake in a plain section, `training.stpes=1`": (["train.py", CONFIG, "training.stpes=1"], 1),
    "a mistake in a model parameter, `model.params.embed_dmi=4`": (
        ["train.py", CONFIG, "model.params.embed_dmi=4"],
        1,
    ),
}


def seconds(checkout: Path, arguments: list[str], status: int) -> float:
    """The wall-clock time of one process; ends everything if its exit status is another."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode != status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {done.returncode}:\n{done.stderr}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    commands = dict(COMMANDS)
    if not (checkout / "ldm" / "__main__.py").exists():
        del commands["`python -m ldm --help`"]
    times = {name: [] for name in commands}
    for turn in range(given.runs + 1):
        for name, command in commands.items():
            took = seconds(checkout, *command)
            if turn > 0:
                times[name].append(took)
    asked = ["git", "-C", checkout, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{processor()}, {os.cpu_count()} cores; {versions};")
    print(f"commit {commit}, {datetime.date.today()}, {given.runs} runs of each\n")
    print("| command | median | range |\n|---|---|---|")
    for name, values in times.items():
        low, high = min(values), max(values)
        print(f"| {name} | {statistics.median(values):.2f} s | {low:.2f} to {high:.2f} s |")


if __name__ == "__main__":
    main()
