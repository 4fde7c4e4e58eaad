"""From a YAML to what a run would need, without data, weights or a GPU.

One step is measured on the meta device, with two images and with three; the rest is arithmetic.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.originals.original_yaml import read_tree
from ldm.planning.bare_networks import work_of_network
from ldm.planning.meter import Cost, Meter
from ldm.planning.work import Work, work_of_run

GIB = 2**30
FLOAT = 4  # bytes
#: What a GPU's memory holds besides tensors: the driver's context, and the gaps of the allocator.
CONTEXT_BYTES, GAPS = 0.7 * GIB, 1.05
_MOST = 2**20  # images in a batch


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for.

    size: of the images in pixels, None for the config's. classes: how many, where the data would be asked;
    None for what is known of an embedded data set, else 1000.
    memory: of one GPU in GiB. tflops: its peak in 1e12 FLOPs a second, of which `utilisation` is reached.
    depth: of the table of layers, None for what suits the network.
    """

    size: int | None = None
    classes: int | None = None
    memory: float = 24.0
    tflops: float = 165.0
    utilisation: float = 0.4
    depth: int | None = None


@dataclass
class Plan:
    """The result; `ldm.planning.report` writes it out. `cost` is that of one image."""

    request: PlanRequest
    work: Work
    cost: Cost
    memory: "Memory"

    @property
    def part_size(self) -> int:
        """Images that one GPU works through at once."""
        training = self.work.training
        return max(1, training.batch_size // (training.accumulate * self.gpus))

    @property
    def gpus(self) -> int:
        return 1 if self.work.training.devices == "auto" else self.work.training.devices

    @property
    def images(self) -> int:
        return self.work.training.steps * self.work.training.batch_size

    @property
    def hours(self) -> float:
        speed = self.gpus * self.request.tflops * 1e12 * self.request.utilisation
        return self.images * self.cost.flops / speed / 3600

    @property
    def largest(self) -> int:
        return self.memory.largest(self.request.memory * GIB)


@dataclass
class Memory:
    """Bytes on a GPU, as a function of the images that it works through at once.

    After every operation of the step, what is alive is linear in the batch, so two measurements give the peak
    at any batch. (A batch of one is not among them: its reshapes copy less.)
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
        """Images at once that so many bytes hold; 0 for none."""
        return bisect.bisect_right(range(1, _MOST), memory, key=self.total)


def make_plan(path: Path, overrides: Iterable[str] = (), request: PlanRequest | None = None) -> Plan:
    """Plan the run that a config describes, or the training of a model or network that a YAML describes.

    Raises:
        ValueError: mistakes in the config; something that cannot be planned without the data.
    """
    request = request or PlanRequest()
    tree = read_tree(path)[0] if path.is_file() else {}
    if {"task", "base"}.isdisjoint(tree) and not {"target", "model"}.isdisjoint(tree):
        work = work_of_network(path, overrides, request.size)
    else:
        work = work_of_run(path, overrides, request.size, request.classes)
    if work.training.accumulate > 1:  # the gradients of the parts before are there already
        for parameter in work.trained:
            parameter.grad = torch.empty_like(parameter)
    depth = request.depth
    if depth is None:
        depth = 2 if hasattr(work.network, "decode_latent") else 1
    costs = [_measure(work, batch, depth) for batch in (2, 3)]
    return Plan(request, work, _of_one_image(*costs), _memory(work, *costs))


def _measure(work: Work, batch: int, depth: int) -> Cost:
    """What a step of `batch` images costs."""
    meter = Meter(work.network, work.parts.values(), depth, work.training.precision != "32")
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


def _memory(work: Work, two: Cost, three: Cost) -> Memory:
    training = work.training
    trained = sum(p.numel() for p in work.trained)
    averaged = sum(p.numel() for p in work.averaged) if training.ema is not None else 0
    weights = {id(t): t for part in work.parts.values() for t in (*part.parameters(), *part.buffers())}
    # The gradients of the parts before, and those that processes exchange.
    several = training.devices not in (1, "auto")
    gradients = trained * FLOAT * ((training.accumulate > 1) + several)
    same = len(two.live) == len(three.live)  # else the step depends on the batch: go by the peaks alone
    live = [cost.live if same else [cost.peak] for cost in (two, three)]
    return Memory(
        sum(t.numel() * t.element_size() for t in weights.values()),
        2 * trained * FLOAT,
        averaged * FLOAT,
        *(torch.tensor(values, dtype=torch.float64) + gradients for values in live),
    )
