"""A run's own training step, on tensors without values."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.config.tree import ASSUMED, places_of
from ldm.planning import stand_ins
from ldm.planning.meter import Meter


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for.

    size: of the images in pixels, None for the config's. classes: how many, where the data would be asked;
    None for what is known of an embedded data set, else 1000.
    memory: of one GPU in GiB. tflops: its peak in 1e12 FLOPs a second, of which `utilisation` is reached.
    depth: of the table of layers, None for what suits the task.
    """

    size: int | None = None
    classes: int | None = None
    memory: float = 24.0
    tflops: float = 165.0
    utilisation: float = 0.4
    depth: int | None = None


@dataclass
class Work:
    """A step without values.

    parts: everything that lies in memory. networks: those whose forward pass is shown by layer.
    trained: what the optimizers train. averaged: the part that has a moving average.
    step(meter, batch): forward and backward of so many images.
    """

    parts: dict[str, nn.Module]
    networks: dict[str, nn.Module]
    trained: list[nn.Parameter]
    averaged: list[nn.Parameter]
    step: Callable[[Meter, int], None]
    shape: str
    depth: int = 1
    notes: list[str] = field(default_factory=list)


def work_of_run(path: Path, overrides: Iterable[str], request: PlanRequest):
    """(keys, work) of the run that a training config describes.

    Raises:
        ValueError: mistakes in the config; something that cannot be planned without the data.
    """
    from ldm.training.methods import find_method
    from ldm.training.run import Run
    from ldm.training.run_config import load_run

    cfg, keys = load_run(path, overrides, assumed=stand_ins.assumed_values(request.size))
    notes = _assumptions(cfg)
    count = request.classes or stand_ins.KNOWN_CLASSES.get(cfg.data.target)

    assumed = f"{stand_ins.CLASSES} classes are assumed (--classes)"

    class Planned(Run):
        def count_classes(self) -> int:
            if count is None and assumed not in notes:
                notes.append(assumed)
            return super().count_classes()

    size, channels = stand_ins.of_data(cfg, "size", request.size), stand_ins.of_data(cfg, "channels")
    images = stand_ins.Images(size, channels, count or stand_ins.CLASSES)
    with torch.device("meta"):
        built = _first_stage(cfg, keys, path, channels, notes)
        run = Planned(cfg, keys, images, None, torch.device("meta"), rehearsal=True, built=built)
        method = find_method(keys.task).build(run).to("meta").train()
    trained = method.trained()

    def step(meter: Meter, count: int) -> None:
        batch = method.example(count)
        for place, loss in enumerate(method.losses()):
            if place and keys.training.accumulate == 1:  # the optimizer before has taken its step
                for parameter in trained[place - 1]:
                    parameter.grad = None
            meter.backward(loss(batch)[0])

    parts = method.parts()
    principal = next(iter(parts.values()))
    sample = method.train_set[(0, 0)]
    shape = f"images {channels}x{size}x{size}"
    if "mean" in sample:
        shape += f", latents {'x'.join(map(str, sample['mean'].shape))}"
        notes.append("the latents are cached, so the first stage only lies in memory")
    return keys, Work(
        parts,
        {"": principal},
        [parameter for group in trained for parameter in group if parameter.requires_grad],
        [parameter for parameter in method.model.parameters() if parameter.requires_grad],
        step,
        shape,
        2 if hasattr(principal, "decode_latent") else 1,
        notes,
    )


def _first_stage(cfg, keys, path: Path, channels: int, notes: list[str]) -> dict[str, nn.Module]:
    """That of a diffusion run, by its key; none for pixels and for other runs."""
    if places_of(cfg).get("first_stage") == ASSUMED:
        keys.first_stage = "first_stage"
        return {"first_stage": stand_ins.OpenFirstStage(channels, cfg.network.params.in_channels)}
    if getattr(keys, "first_stage", None) is None:
        return {}
    return {"first_stage": stand_ins.first_stage(keys.first_stage, keys.first_stage_config, path, notes)}


def _assumptions(cfg) -> list[str]:
    """What was filled in and decides the numbers."""
    filled = {path for path, place in places_of(cfg).items() if place == ASSUMED}
    notes = []
    if "data.params.size" in filled:
        notes.append(f"images of {cfg.data.params.size} pixels are assumed (--size)")
    if "first_stage" in filled:
        notes.append(
            f"first_stage is open: it is left out, and {stand_ins.FACTOR} times smaller sides are assumed; "
            "give first_stage=RUN, or an autoencoder's YAML: first_stage=configs/autoencoder/kl-f8.yaml"
        )
    return notes
