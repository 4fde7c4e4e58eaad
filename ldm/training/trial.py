"""`--dry-run`: everything built, one batch forward and backward on one device, nothing kept."""

import sys
from dataclasses import replace

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import nn

from ldm.training.loop.data_module import RunData
from ldm.training.loop.trainer import check_batch, device_count, make_trainer, own_parts
from ldm.training.method import Method
from ldm.training.methods import find_method
from ldm.training.networks import compile_blocks
from ldm.training.run import begin
from ldm.training.run_config import RunConfig


def one_step(cfg, keys: RunConfig) -> str:
    """Build a checked config, take one step on one device, and report."""
    devices = device_count(keys.training)
    check_batch(keys.training, devices)
    keys.training = replace(
        keys.training, steps=1, devices=1, batch_size=keys.training.batch_size // devices, workers=0
    )
    own_parts(cfg, "callbacks", pl.Callback), own_parts(cfg, "loggers", Logger)
    trainer = make_trainer(keys, find_method(keys.task), [_OneStep()])
    run = begin(cfg, keys, trainer.strategy.root_device, rehearsal=True)
    method = find_method(keys.task).build(run)
    if keys.training.compile:
        compile_blocks(method)
    trainer.fit(method, datamodule=RunData(method))
    return "\n".join(_report(method))


class _OneStep(pl.Callback):
    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx) -> None:
        trainer.should_stop = True


def _report(method: Method) -> list[str]:
    keys, training = method.keys, method.settings
    trained = {id(p) for group in method.trained() for p in group}
    networks = dict(method.model.named_children())
    for name, child in method.named_children():
        if child is not method.model:
            networks |= {f"{name}.{inner}": network for inner, network in child.named_children()}
    held_out = len(method.validation_set) if method.validation_set is not None else 0
    return [
        f"{keys.task} {keys.name!r}: one step of {training.batch_size} images on {method.device}",
        f"data       {len(method.train_set)} images to train on, {held_out} held out",
        *(_parameters(name, network, trained) for name, network in networks.items()),
        *(f"sample     {name:10s} {_shape(value)}" for name, value in method.train_set[(0, 0)].items()),
        *(f"figure     {name:10s} {value:.5g}" for name, value in method.figures.items()),
        _memory(method.device),
    ]


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
