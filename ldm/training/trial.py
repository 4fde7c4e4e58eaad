"""One step of a run, for `--dry-run`."""

import sys
from dataclasses import replace

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.training.autoencoder import AutoencoderTask
from ldm.training.networks import compile_blocks
from ldm.training.run_config import RunConfig
from ldm.training.stage import Stage
from ldm.training.stages import build_stage
from ldm.training.task import Task
from ldm.training.trainer import TrainingData, check_batch, device_count, make_trainer


def one_step(cfg, run: RunConfig) -> str:
    """Build a checked config, take one step on one device, and report."""
    devices = device_count(run.training)
    check_batch(run.training, devices)
    run.training = replace(
        run.training, steps=1, devices=1, batch_size=run.training.batch_size // devices, workers=0
    )
    trainer = make_trainer(run, [_OneStep()])
    stage = build_stage(run, cfg, trainer.strategy.root_device, rehearsal=True)
    task = stage.task
    if isinstance(task, AutoencoderTask):
        task.loss.disc_start = 0  # the memory is that of the whole run, not of its beginning
    if run.training.compile:
        compile_blocks(task)
    trainer.fit(task, datamodule=TrainingData(stage, run.training, run.seed, 0))
    return "\n".join(_report(run, stage, task))


class _OneStep(pl.Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        trainer.should_stop = True


def _report(run: RunConfig, stage: Stage, task: Task) -> list[str]:
    trained = {id(p) for group in task.optimized() for p in group}
    networks = dict(task.averaged.named_children())
    if isinstance(task, AutoencoderTask):
        networks |= {f"loss.{name}": child for name, child in task.loss.named_children()}
    held_out = len(stage.validation) if stage.validation is not None else 0
    return [
        f"{run.task} {run.name!r}: one step of {run.training.batch_size} images on {task.device}",
        f"data       {len(stage.train)} images to train on, {held_out} held out",
        *(_parameters(name, network, trained) for name, network in networks.items()),
        *(f"sample     {name:10s} {_shape(value)}" for name, value in stage.train[(0, 0)].items()),
        *_latents(task, stage),
        *(f"figure     {name:10s} {float(value):.5g}" for name, value in task.logs.items()),
        _memory(task.device),
    ]


def _latents(task: Task, stage: Stage) -> list[str]:
    if not hasattr(task, "latent_shape"):
        return []
    return [f"latents    {task.latent_shape({'image': stage.train[(0, 0)]['image'][None]})}"]


def _parameters(name: str, network: nn.Module, trained: set[int]) -> str:
    every = sum(p.numel() for p in network.parameters())
    learning = sum(p.numel() for p in network.parameters() if id(p) in trained)
    return f"parameters {name:20s} {every / 1e6:10.3f} M, {learning / 1e6:.3f} M trained"


def _shape(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"memory     peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "memory     not measured on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"memory     peak {peak / 2**30:.2f} GiB of this process"
