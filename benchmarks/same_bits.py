"""Do two checkouts of this project train and sample to the same bits?

    python benchmarks/same_bits.py OLD NEW [--threads 1] [--keep FOLDER]

With each checkout in turn, and with OLD's configs for both: a small quickstart autoencoder (with dropout, and
with a discriminator from step 5 on) and its diffusion model are trained for 20 steps, once in one go and once
continued from a checkpoint at step 10, and 8 images are drawn with each of two samplers. Prints a table of
what is equal and what is not; ends with status 1 if anything differs. Two minutes on two CPU cores.
"""

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

STEPS = {"in one go": (20,), "continued": (10, 20)}
SAMPLERS = {"own sampler": (), "ddim, eta 0.5": ("--sampler=ddim", "--eta=0.5")}
#: Parts of a training checkpoint, and what they are called in the table.
PARTS = {"model": "raw weights", "ema": "averages", "optimizers": "optimizer state", "extra": "discriminator"}
TIMINGS = ("second", "time")  # columns of the logs that no two runs share

SHARED = (
    "training.batch_size=16",
    "training.checkpoint_every=10",
    "training.optimizer.warmup=5",
    "training.accelerator=cpu",
    "training.workers=0",
    "logging.every=1",
    "logging.images=4",
    "logging.images_every=10",
    "logging.validate_every=10",
    "logging.tensorboard=false",
    "logging.progress=false",
)
OVERRIDES = {
    "autoencoder": (
        "model.params.ddconfig.ch=8",
        "model.params.ddconfig.dropout=0.1",
        "loss.params.disc_weight=0.5",
        "loss.params.disc_start=5",
        "loss.params.disc_in_channels=1",
        "loss.params.disc_num_layers=2",
        "loss.params.disc_ndf=8",
    ),
    "diffusion": ("network.params.model_channels=32",),
}

# Runs with the code of a checkout. Names of tensors are paths in the state that its own reader returns.
DUMP = """
import sys
from pathlib import Path
import ldm, numpy, torch
from ldm.checkpoints.native import read_training

def leaves(tree, path):
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, (torch.Tensor, int, float)):
        yield path, numpy.asarray(tree)

checkout, checkpoint, target, *parts = sys.argv[1:]
if not Path(ldm.__file__).resolve().is_relative_to(checkout):
    sys.exit(f"{ldm.__file__} was imported, which does not lie in {checkout}")
state = read_training(Path(checkpoint))
numpy.savez(target, **{name: leaf for part in parts for name, leaf in leaves(state[part], part)})
"""

Arrays = dict[str, np.ndarray]


class Side:
    """One checkout at work: what it trains and draws goes into `place`."""

    def __init__(self, checkout: Path, place: Path, threads: int):
        self.checkout, self.place = checkout, place
        counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        self.environment = {**os.environ, **counts, "PYTHONPATH": str(checkout)}

    def python(self, *arguments: str | Path) -> None:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.checkout, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{self.checkout}: {' '.join(command)}\n{done.stdout}{done.stderr}")

    def work(self, configs: Path) -> None:
        for variant, stops in STEPS.items():
            runs = self.place / variant
            first_stage = {"diffusion": (f"first_stage={runs / 'autoencoder'}",)}
            for task, overrides in OVERRIDES.items():
                own = (f"runs={runs}", f"name={task}", *SHARED, *overrides, *first_stage.get(task, ()))
                for steps in stops:
                    self.python("train.py", configs / f"{task}.yaml", *own, f"training.steps={steps}")
        model = self.place / "in one go" / "diffusion"
        for name, options in SAMPLERS.items():
            self.python("sample.py", model, "--n=8", f"--out={self.place / name}", "--device=cpu", *options)

    def results(self) -> dict[str, Arrays]:
        """What there is to compare, under what the table calls it."""
        found = {}
        for variant in STEPS:
            for task in OVERRIDES:
                run, title = self.place / variant / task, f"{task} {variant}"
                found |= {f"{title}: {name}": arrays for name, arrays in self.checkpoint(run).items()}
                found[f"{title}: exported files"] = exported(run)
                found[f"{title}: logged figures"] = figures(run / "logs")
                found[f"{title}: grids"] = pixels(run / "images")
        return found | {f"samples, {name}": pixels(self.place / name) for name in SAMPLERS}

    def checkpoint(self, run: Path) -> dict[str, Arrays]:
        """The last checkpoint, part by part."""
        newest = sorted((run / "checkpoints").glob("step-*.ckpt"))[-1]
        target = run / "state.npz"
        self.python("-c", DUMP, self.checkout, newest, target, *PARTS)
        arrays = dict(np.load(target))
        split = {
            title: {name: array for name, array in arrays.items() if name.split("/")[0] == part}
            for part, title in PARTS.items()
        }
        return {title: part for title, part in split.items() if part or title != PARTS["extra"]}


def exported(run: Path) -> Arrays:
    files = sorted(run.glob("*.safetensors"))
    return {f"{file.name}/{name}": array for file in files for name, array in load_file(file).items()}


def figures(logs: Path) -> Arrays:
    """The columns of each table; an empty field is not a number."""
    found = {}
    for file in sorted(logs.glob("*.csv")):
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        for column in rows[0]:
            if not any(word in column for word in TIMINGS):
                found[f"{file.name}/{column}"] = np.array([float(row[column] or "nan") for row in rows])
    return found


def pixels(folder: Path) -> Arrays:
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def verdict(old: Arrays, new: Arrays) -> str | None:
    """How two sets of arrays differ, None where every bit is the same."""
    if not old and not new:
        return "neither checkout wrote any"
    if lone := sorted(old.keys() ^ new.keys()):
        return f"{lone[0]} is only in {'OLD' if lone[0] in old else 'NEW'} ({len(lone)} such)"
    for name in old:
        a, b = old[name], new[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{name} was {a.dtype} {a.shape}, is {b.dtype} {b.shape}"
    differing = [name for name in old if old[name].tobytes() != new[name].tobytes()]
    if not differing:
        return None
    gaps = [np.abs(old[name].astype(float) - new[name].astype(float)) for name in differing]
    largest = max(float(np.nanmax(gap, initial=0.0)) for gap in gaps)
    return f"{len(differing)} differ by up to {largest:.3g}, first {differing[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout of the project")
    parser.add_argument("new", type=Path, help="another one, or the same")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the runs and samples, which must be new")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True)
    configs = given.old.resolve() / "configs" / "quickstart"
    results = []
    with contextlib.nullcontext(given.keep) if given.keep else tempfile.TemporaryDirectory() as folder:
        for name in ("old", "new"):
            side = Side(getattr(given, name).resolve(), Path(folder).resolve() / name, given.threads)
            side.work(configs)
            results.append(side.results())
    old, new = results
    differing = 0
    for what in old | new:
        found = verdict(old.get(what, {}), new.get(what, {}))
        differing += found is not None
        print(f"{what:45s} {len(old.get(what, {})):4d} compared: {found or 'equal'}")
    print(f"{differing} of {len(old | new)} differ" if differing else "the same bits")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
