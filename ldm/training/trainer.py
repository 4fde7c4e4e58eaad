"""The Lightning trainer, of which only devices, strategy, precision and hooks are used: the rest is ours."""

import logging
import warnings

import pytorch_lightning as pl
import torch

from ldm.data import PositionSampler, make_loader
from ldm.training.interruption import own_signals
from ldm.training.networks import keep_freed_memory
from ldm.training.run_config import AutoencoderRun, RunConfig
from ldm.training.settings import TrainingSettings
from ldm.training.stage import Stage

# Advice of Lightning's that does not apply: workers are chosen by measure, epochs and its loggers not used.
_NOT_FOR_US = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*no `val_dataloader`.*",
    ".*lr_scheduler.*",
    ".*max_epochs.*",
    ".*IterableDataset.*",
    ".*number of training batches.*",
    ".*in eval mode at the start of training.*",
)


class TrainingData(pl.LightningDataModule):
    """Batches from `start_step` on; made after the processes are up, so that each knows its rank."""

    def __init__(self, stage: Stage, training: TrainingSettings, seed: int, start_step: int):
        super().__init__()
        self.stage, self.training, self.seed, self.start_step = stage, training, seed, start_step

    def train_dataloader(self):
        sampler = PositionSampler(
            len(self.stage.train),
            self.seed,
            self.training.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start_step=self.start_step,
            steps=self.training.steps,
        )
        ranks = self.trainer.num_devices  # of this machine
        return make_loader(self.stage.train, sampler, self.training.workers, ranks_on_node=ranks)


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


def quiet_lightning() -> None:
    for pattern in _NOT_FOR_US:
        warnings.filterwarnings("ignore", pattern)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)


def make_trainer(run: RunConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A trainer for this run's devices."""
    quiet_lightning()
    gpu, devices = uses_gpu(run.training), device_count(run.training)
    check_batch(run.training, devices)
    # The discriminator rests before disc_start, and the autoencoder rests while it learns.
    ddp = "ddp_find_unused_parameters_true" if isinstance(run, AutoencoderRun) else "ddp"
    if gpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    trainer = pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=devices,
        strategy=ddp if devices > 1 else "auto",
        precision=pick_precision(run.training, gpu),
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        default_root_dir=run.folder,
    )
    own_signals(trainer)
    return trainer
