"""From a training config to what the run would need, without data, weights or a GPU.

One step of the run is measured on the meta device, with two images and with three; the rest is arithmetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.originals.original_yaml import read_tree
from ldm.checkpoints.trust import is_run_config
from ldm.planning.bare_networks import network_work, read_network
from ldm.planning.meter import Cost, Meter
from ldm.planning.work import PlanRequest, Work, work_of_run

GIB = 2**30
FLOAT = 4  # bytes
#: What a GPU's memory holds besides tensors: the driver's context, and the gaps of the allocator.
CONTEXT_BYTES, GAPS = 0.7 * GIB, 1.05
_MOST = 2**20  # images in a batch


@dataclass
class Plan:
    """The result; `ldm.planning.report` writes it out."""

    run: Any
    request: PlanRequest
    work: Work
    cost: Cost  # of one image
    memory: "Memory"
    half: bool

    @property
    def part_size(self) -> int:
        """Images that one GPU works through at once."""
        training = self.run.training
        return max(1, training.batch_size // (training.accumulate * self.gpus))

    @property
    def gpus(self) -> int:
        return 1 if self.run.training.devices == "auto" else self.run.training.devices

    @property
    def images(self) -> int:
        return self.run.training.steps * self.run.training.batch_size

    @property
    def hours(self) -> float:
        speed = self.gpus * self.request.tflops * 1e12 * self.request.utilisation
        return self.images * self.cost.flops / speed / 3600

    @property
    def largest(self) -> int:
        """Images at once that the GPU's memory holds; 0 for none."""
        return self.memory.largest(self.request.memory * GIB)


@dataclass
class Memory:
    """Bytes on a GPU, as a function of the images that it works through at once.

    Every operation of the step leaves a number of bytes alive that is linear in the batch, so two
    measurements give the peak at any batch. (A batch of one is not among them: its reshapes copy less.)
    """

    weights: int
    optimizer: int
    average: int
    two: Tensor  # float64, bytes alive after every operation with two images
    three: Tensor  # with three

    @property
    def resident(self) -> int:
        return self.weights + self.optimizer + self.average

    def step(self, batch: int) -> float:
        """The peak of activations, gradients and copies in a step."""
        return float((self.two + (batch - 2) * (self.three - self.two)).max())

    def total(self, batch: int) -> float:
        return (self.resident + self.step(batch)) * GAPS + CONTEXT_BYTES

    def largest(self, memory: float) -> int:
        if self.total(1) > memory:
            return 0
        low, high = 1, _MOST
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= memory else (low, middle)
        return low


def make_plan(path: Path, overrides: Iterable[str] = (), request: PlanRequest | None = None) -> Plan:
    """Plan the run that a config describes, or the training of a model or network that a YAML describes.

    Raises:
        ValueError: mistakes in the config; something that cannot be planned without the data.
    """
    request = request or PlanRequest()
    if path.is_file() and not is_run_config(path) and _has_model(path):
        model, node, run = read_network(path, overrides)
        work = network_work(model, node, run, request)
    else:
        run, work = work_of_run(path, overrides, request)
    half = run.training.precision != "32"
    if run.training.accumulate > 1:  # the gradients of the parts before are there already
        for parameter in work.trained:
            parameter.grad = torch.empty_like(parameter)
    depth = work.depth if request.depth is None else request.depth
    costs = [measure(work, batch, half, depth) for batch in (2, 3)]
    return Plan(run, request, work, _of_one_image(*costs), _memory(run, work, *costs), half)


def _has_model(path: Path) -> bool:
    tree, _ = read_tree(path)
    return "target" in tree or "model" in tree


def measure(work: Work, batch: int, half: bool, depth: int) -> Cost:
    """What a step of `batch` images costs."""
    meter = Meter(work.networks, work.parts.values(), depth, half)
    before = [parameter.grad for parameter in work.trained]
    with meter.running():
        work.step(meter, batch)
    for parameter, gradient in zip(work.trained, before, strict=True):
        parameter.grad = gradient
    return meter.cost


def _of_one_image(two: Cost, three: Cost) -> Cost:
    layers = [
        replace(b, flops=b.flops - a.flops, saved=b.saved - a.saved)
        for a, b in zip(two.layers, three.layers, strict=True)
    ]
    return Cost(three.flops - two.flops, layers)


def _memory(run, work: Work, two: Cost, three: Cost) -> Memory:
    trained = sum(p.numel() for p in work.trained)
    averaged = sum(p.numel() for p in work.averaged) if run.training.ema is not None else 0
    weights = {id(t): t for part in work.parts.values() for t in (*part.parameters(), *part.buffers())}
    # The gradients of the parts before, and those that processes exchange.
    several = run.training.devices not in (1, "auto")
    gradients = trained * FLOAT * ((run.training.accumulate > 1) + several)
    live = [two.live, three.live]
    if len(two.live) != len(three.live):  # the step depends on the batch: go by the peaks alone
        live = [[two.peak], [three.peak]]
    return Memory(
        sum(t.numel() * t.element_size() for t in weights.values()),
        2 * trained * FLOAT,
        averaged * FLOAT,
        *(torch.tensor(values, dtype=torch.float64) + gradients for values in live),
    )
