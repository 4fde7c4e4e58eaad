"""The Lightning trainer of a run."""

import logging
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from ldm import config as configuration
from ldm.training.loop.interruption import own_signals
from ldm.training.method import Method
from ldm.training.networks import keep_freed_memory
from ldm.training.run_config import RunConfig
from ldm.training.settings import TrainingSettings

# Advice of Lightning's that does not apply: workers are chosen by measure, epochs not used.
_NOT_FOR_US = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*no `val_dataloader`.*",
    ".*lr_scheduler.*",
    ".*max_epochs.*",
    ".*IterableDataset.*",
    ".*number of training batches.*",
    ".*in eval mode at the start of training.*",
    ".*sync_dist.*",
    ".*across ranks is zero.*",
    ".*experiment logs directory.*",
)


def check_batch(training: TrainingSettings, devices: int) -> None:
    """ValueError where the batch does not divide over devices and accumulation steps."""
    share = devices * training.accumulate
    if training.batch_size % share:
        below = training.batch_size // share * share
        raise ValueError(
            f"training.batch_size {training.batch_size} does not divide into {devices} device(s) x "
            f"{training.accumulate} accumulation step(s); the nearest that do are "
            f"{', '.join(str(size) for size in (below, below + share) if size)}"
        )


def uses_gpu(settings: TrainingSettings) -> bool:
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("training.accelerator=gpu, but torch sees no GPU; use accelerator=cpu or auto")
    return settings.accelerator != "cpu" and torch.cuda.is_available()


def device_count(settings: TrainingSettings) -> int:
    gpus = torch.cuda.device_count() if uses_gpu(settings) else None
    if settings.devices == "auto":
        return 1 if gpus is None else gpus
    if gpus is not None and settings.devices > gpus:
        raise ValueError(f"training.devices={settings.devices}, but there are {gpus} GPUs")
    return settings.devices


def pick_precision(settings: TrainingSettings, gpu: bool) -> str:
    if settings.precision == "auto":
        return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return {"32": "32-true", "bf16": "bf16-mixed"}[settings.precision]


def own_parts(cfg, name: str, kind: type) -> list:
    """What `callbacks:` or `loggers:` of a config names.

    Raises:
        ValueError: something else than a part of Lightning's of this kind, or its own checkpoints.
    """
    made = [configuration.instantiate(part, allow_foreign=True) for part in cfg.get(name) or []]
    for i, part in enumerate(made):
        if not isinstance(part, kind):
            raise ValueError(f"{name}.{i} is a {type(part).__name__}, no {kind.__name__} of Lightning's")
        if isinstance(part, pl.callbacks.Checkpoint):
            raise ValueError(f"{name}.{i}: a run writes its own checkpoints, see training.checkpoint_every")
    return made


def quiet_lightning() -> None:
    for pattern in _NOT_FOR_US:
        warnings.filterwarnings("ignore", pattern)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)


def make_trainer(
    keys: RunConfig,
    method: type[Method],
    callbacks: list[pl.Callback],
    loggers: list[Logger] | None = None,
) -> pl.Trainer:
    """A trainer for this run's devices."""
    quiet_lightning()
    training, logging_ = keys.training, keys.logging
    gpu, devices = uses_gpu(training), device_count(training)
    check_batch(training, devices)
    ddp = "ddp_find_unused_parameters_true" if method.rests else "ddp"
    if gpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    validates = bool(loggers is not None and logging_.validate_every)
    trainer = pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=devices,
        strategy=ddp if devices > 1 else "auto",
        precision=pick_precision(training, gpu),
        max_epochs=-1,
        logger=loggers or False,
        log_every_n_steps=logging_.every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        val_check_interval=logging_.validate_every if validates else None,
        check_val_every_n_epoch=None if validates else 1,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        inference_mode=False,
        callbacks=callbacks,
        default_root_dir=keys.folder,
    )
    own_signals(trainer)
    return trainer
