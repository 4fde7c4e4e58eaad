"""Tiny training runs for tests: images, configs of both stages, and commands as real processes."""

import atexit
import copy
import csv
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from PIL import Image

from ldm.checkpoints import native
from ldm.training.method import Method
from ldm.training.methods import find_method
from ldm.training.run import begin
from ldm.training.run_config import load_run

ROOT = Path(__file__).parent.parent
SIZE = 16
AUTOENCODER = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 2,
        "ddconfig": {
            "double_z": True,
            "z_channels": 2,
            "resolution": SIZE,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 8,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "attn_type": "none",
            "dropout": 0.1,
            "num_groups": 4,
        },
    },
}
LOSS = {
    "target": "ldm.losses.AutoencoderLoss",
    "params": {
        "perceptual": None,
        "kl_weight": 1e-4,
        "disc_start": 4,
        "disc_num_layers": 1,
        "disc_ndf": 8,
    },
}
NETWORK = {
    "target": "ldm.models.unet.UNetModel",
    "params": {
        "in_channels": 2,
        "out_channels": 2,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_head_channels": 8,
        "num_groups": 8,
        "dropout": 0.1,
        "num_classes": "sequential",
        "adm_in_channels": 8,
    },
}
CONDITIONER = {
    "target": "ldm.conditioning.Conditioner",
    "params": {
        "embedders": [
            {
                "target": "ldm.conditioning.ClassEmbedder",
                "params": {"num_classes": "auto", "dim": 8, "kind": "vector", "drop": 0.2},
            }
        ]
    },
}
TRAINING = {
    "steps": 24,
    "batch_size": 8,
    "ema": 0.9,
    "accelerator": "cpu",
    "workers": 0,
    "checkpoint_every": 5,
    "optimizer": {"lr": 1e-3, "warmup": 3, "decay": "cosine"},
}
LOGGING = {
    "every": 1,
    "images": 3,
    "images_every": 10,
    "validate_every": 10,
    "tensorboard": False,
    "progress": False,
}


def write_images(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 9, mode: str = "RGB"
) -> Path:
    """A folder of small smooth pictures, `each` a class; without classes all lie in `root` itself."""
    generator = np.random.default_rng(0)
    for name in classes or ("",):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            coarse.resize((20, 18), Image.Resampling.BICUBIC).convert(mode).save(root / name / f"{i}.png")
    return root


def autoencoder_config(images: Path, runs: Path, name: str = "ae") -> dict:
    config = {
        "task": "autoencoder",
        "name": name,
        "runs": str(runs),
        "data": _data(images),
        "model": AUTOENCODER,
        "loss": LOSS,
        "training": TRAINING,
        "logging": LOGGING,
    }
    return copy.deepcopy(config)  # a test may change its own


def diffusion_config(images: Path, runs: Path, first_stage: Path | None, name: str = "ldm") -> dict:
    config = {
        "task": "diffusion",
        "name": name,
        "runs": str(runs),
        "first_stage": str(first_stage) if first_stage else None,
        "data": _data(images, flip=True),
        "network": NETWORK,
        "conditioner": CONDITIONER,
        "denoiser": {
            "target": "ldm.diffusion.denoiser.Denoiser",
            "params": {"prediction": "flow", "schedule": {"target": "ldm.diffusion.schedule.FlowSchedule"}},
        },
        "objective": {"target": "ldm.diffusion.objective.Objective"},
        "sampling": {"steps": 2, "guidance": 2.0},
        "training": TRAINING,
        "logging": LOGGING,
    }
    return copy.deepcopy(config)


def _data(images: Path, **params) -> dict:
    params = {"root": str(images), "size": SIZE, "validation": 0.2, **params}
    return {"target": "ldm.data.ImageFolder", "params": params}


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))  # no anchors
    return path


# What a run leaves


def newest_state(run: Path) -> dict:
    return native.read_training(native.newest_training(run))


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in (run / "checkpoints").glob("step-*.ckpt"))


def rows(run: Path, table: str = "train") -> list[dict[str, str]]:
    path = run / "logs" / f"{table}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def differences(a, b, path: str = "") -> list[str]:
    """Places where two trees of containers, tensors and values are not equal to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        lone = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        return lone + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


def run_differences(a: Path, b: Path) -> list[str]:
    """How the results of two runs differ: last state (weights, averages, moments), export, logs, images."""
    found = differences(newest_state(a), newest_state(b), "state")
    model_a, model_b = ((run / native.MODEL_FILE).read_bytes() for run in (a, b))
    found += [] if model_a == model_b else [native.MODEL_FILE]
    for table in ("train", "validation"):
        left, right = rows(a, table), rows(b, table)
        for row in (*left, *right):
            row.pop("images_per_second", None)
        found += [] if left == right else [f"logs/{table}.csv"]
    left, right = ({p.name: p.read_bytes() for p in (run / "images").iterdir()} for run in (a, b))
    return found + [
        f"images/{name}" for name in left.keys() | right.keys() if left.get(name) != right.get(name)
    ]


def leftovers(run: Path) -> list[str]:
    """Files that are no part of a finished run folder."""
    known = {"config.yaml", "model.safetensors", "first_stage.safetensors", ".lock"}
    folders = {"checkpoints": ".ckpt", "images": ".png", "logs": ".csv"}
    return [
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file()
        and path.name not in known
        and (path.name.startswith(".") or folders.get(path.parent.name) != path.suffix)
    ]


# Commands


class Command:
    """`python train.py ARGUMENTS` under way; `output` is what it has said so far on stdout and stderr."""

    def __init__(self, server: "Server", log: Path, pid: int):
        self.server, self.log, self.pid = server, log, pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def ended(self) -> bool:
        return self.pid in self.server.codes

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """Its exit code, negative for the signal that ended it."""
        self.until(lambda: self.ended, timeout)
        return self.server.codes[self.pid]

    def wait_for_group(self, timeout: float = 20) -> None:
        """Wait until the processes that it started are gone too; an error if they stay."""
        deadline = time.monotonic() + timeout
        while alive := _alive_in_group(self.pid):
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"processes {alive} are left behind:\n{self.output}")
            time.sleep(0.05)

    def until(self, happened: Callable[[], bool], timeout: float = 60) -> None:
        """Wait for something; an error, with the output, if the command ends or the time is up before."""
        deadline = time.monotonic() + timeout
        while not happened():
            if self.ended and not happened():
                raise AssertionError(f"ended with {self.server.codes[self.pid]}:\n{self.output}")
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"not within {timeout} s:\n{self.output}")
            time.sleep(0.001)


def _alive_in_group(group: int) -> list[int]:
    """Processes of a group, without those that have ended and wait for whoever adopts them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # gone meanwhile
            continue
        if int(of_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


class Server:
    """The process that starts commands; see `training_server.py`."""

    def __init__(self):
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "training_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        self.codes: dict[int, int] = {}
        self._started: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self._end)

    def _end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _listen(self) -> None:
        for line in self.process.stdout:
            message = json.loads(line)
            if "started" in message:
                self._started.put(message["started"])
            else:
                self.codes[message["pid"]] = message["code"]

    def start(
        self,
        arguments: list,
        log: Path,
        cwd: Path = ROOT,
        file_size: int | None = None,
        die_at: tuple[str, str] | None = None,
    ) -> Command:
        log.write_text("")
        request = {
            "arguments": [str(a) for a in arguments],
            "log": str(log),
            "cwd": str(cwd),
            "script": str(ROOT / "train.py"),
            "file_size": file_size,
            "die_at": die_at,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Command(self, log, self._started.get(timeout=120))


_server: list[Server] = []


def start(*arguments, log: Path, **options) -> Command:
    """Start `python train.py ARGUMENTS` as a process of its own.

    log: where it writes stdout and stderr. cwd: where it runs. file_size: most bytes it can write to a file.
    die_at: ("os.rename" | "open", end of a file name), before which it is killed.
    """
    if not _server:
        _server.append(Server())
    return _server[0].start(list(arguments), log, **options)


def finish(*arguments, log: Path, code: int = 0, timeout: float = 90, **options) -> str:
    """Run `python train.py ARGUMENTS` to its end, which must be with `code`; returns what it said."""
    command = start(*arguments, log=log, **options)
    ended = command.wait(timeout)
    assert ended == code, f"exit code {ended}, not {code}:\n{command.output}"
    return command.output


# Methods taken through steps by hand


def build_method(path: Path, overrides=(), **changes) -> Method:
    """The method of a config, on the CPU."""
    cfg, keys = load_run(path, overrides)
    return find_method(keys.task).build(begin(cfg, keys, torch.device("cpu"), **changes))


def attach(method: Method) -> SimpleNamespace:
    """Just enough of a trainer to step by hand; the caller keeps it."""
    strategy = SimpleNamespace(backward=lambda loss, optimizer, *args, **kw: loss.backward(*args, **kw))
    trainer = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0, loggers=[])
    method.trainer = trainer
    method.keys.logging.every = 1
    method.log_dict = lambda figures: None
    strategy._lightning_optimizers = method.configure_optimizers()
    return trainer
