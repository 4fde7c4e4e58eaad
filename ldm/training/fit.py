"""One run from beginning to end: its folder, its stage, its trainer, and what is said about it."""

import logging
import signal
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch

from ldm.training.callbacks import Checkpoints, Figures, Pictures, Validation
from ldm.training.interruption import Interruption
from ldm.training.logs import RunLogs
from ldm.training.networks import compile_blocks
from ldm.training.run_config import RunConfig, complete
from ldm.training.run_folder import RunFolder
from ldm.training.stage import Stage
from ldm.training.stages import build_stage
from ldm.training.trainer import TrainingData, make_trainer, uses_gpu

log = logging.getLogger(__name__)


def fit(cfg, run: RunConfig) -> Path | None:
    """Train a checked config; see `ldm.training.run.train`."""
    interruption = Interruption()
    trainer = make_trainer(run, [interruption])
    folder, config = RunFolder(run.folder), complete(cfg, run)
    if not trainer.is_global_zero:
        logging.getLogger("ldm").setLevel(logging.WARNING)
        _fit(cfg, run, folder, config, trainer, interruption)
        return None
    with folder.held():
        _fit(cfg, run, folder, config, trainer, interruption)
    return folder.path


def _fit(
    cfg,
    run: RunConfig,
    folder: RunFolder,
    config: Mapping,
    trainer: pl.Trainer,
    interruption: Interruption,
) -> None:
    """What each process does; `config` is the complete one, for the folder."""
    writes = trainer.is_global_zero
    state = folder.find(config) if writes else folder.newest_state()
    if state is not None and state["step"] >= run.training.steps:
        _finish(run, folder, state, writes)
        return
    stage = build_stage(run, cfg, trainer.strategy.root_device, resuming=state is not None)
    task = stage.task
    if state is not None:
        task.resume_from(state)
        _tell_resumed(run, folder, stage, state)
        del state
    logs = None
    if writes:
        folder.prepare(config)
        if stage.keep is not None:
            stage.keep(folder.path)
        logs = RunLogs(folder.logs, task.step, run.logging.tensorboard)
    _announce(run, stage, trainer)
    if run.training.compile:
        compile_blocks(task)
    trainer.callbacks.extend(_callbacks(run, stage, folder, logs))
    try:
        _step_until_done(run, stage, folder, trainer, interruption)
    finally:
        if logs is not None:
            logs.close()
    if interruption.asked is not None and task.step < run.training.steps and writes:
        raise KeyboardInterrupt(f"stopped at step {task.step}; the same command continues {folder.path}")


def _step_until_done(
    run: RunConfig, stage: Stage, folder: RunFolder, trainer: pl.Trainer, interruption: Interruption
) -> None:
    data = TrainingData(stage, run.training, run.seed, stage.task.step)
    try:
        with interruption:
            trainer.fit(stage.task, datamodule=data)
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt
        if interruption.asked is None:
            raise
        raise KeyboardInterrupt(f"stopped at once; the same command continues {folder.path}") from stop
    except BaseException:
        _end_others(trainer)
        raise


def _finish(run: RunConfig, folder: RunFolder, state: Mapping, writes: bool) -> None:
    """A run without a step left to take."""
    if not writes:
        return
    folder.finish(state)
    log.info(
        "%s is complete: step %d of %d. A larger training.steps continues it.",
        *(folder.path, state["step"], run.training.steps),
    )


def _callbacks(run: RunConfig, stage: Stage, folder: RunFolder, logs: RunLogs | None) -> list[pl.Callback]:
    steps, settings = run.training.steps, run.logging
    figures = Figures(logs, settings, run.training)
    held_out = stage.held_out(run.training, settings)
    return [
        figures,
        Validation(held_out, logs, figures, settings.validate_every, steps),
        Pictures(stage.draw.name, stage.draw, folder, settings.images_every, steps),
        Checkpoints(folder, stage.description, {"data": stage.data}, run.training),
    ]


def _end_others(trainer: pl.Trainer) -> None:
    """End the processes that this one started: they would wait for it, on GPUs for half an hour."""
    launcher = trainer.strategy.launcher
    for process in getattr(launcher, "procs", ()):
        process.send_signal(signal.SIGKILL)


def _tell_resumed(run: RunConfig, folder: RunFolder, stage: Stage, state: Mapping) -> None:
    log.info("continuing %s at step %d of %d", folder.path, state["step"], run.training.steps)
    before = state.get("data", stage.data)
    if before != stage.data:
        log.warning(
            "the training data changed since that checkpoint (%d images then, %d now): the run goes on, with "
            "other images than it would have seen",
            *(before["images"], stage.data["images"]),
        )


def _announce(run: RunConfig, stage: Stage, trainer: pl.Trainer) -> None:
    """What is about to happen, in a few lines."""
    training = run.training
    trained = sum(p.numel() for group in stage.task.optimized() for p in group)
    held_out = len(stage.validation) if stage.validation is not None else 0
    log.info("%s: %s, %.2f M trained parameters", run.folder, run.task, trained / 1e6)
    log.info(
        "data: %d image%s to train on, %d held out; %d step%s of %d",
        *(len(stage.train), "" if len(stage.train) == 1 else "s", held_out),
        *(training.steps, "" if training.steps == 1 else "s", training.batch_size),
    )
    device = torch.cuda.get_device_name() if uses_gpu(training) else f"CPU, {torch.get_num_threads()} threads"
    log.info("device: %d x %s, precision %s", trainer.world_size, device, trainer.precision)
    if training.optimizer.scale_lr:
        lr = training.optimizer.lr
        log.info(
            "scale_lr: learning rate %g x batch size %d = %g",
            *(lr, training.batch_size, lr * training.batch_size),
        )
