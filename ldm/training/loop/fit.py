"""One run from beginning to end: its folder, its method, its trainer, and what is said about it."""

import logging
import signal
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from ldm.training.loop.callbacks import Checkpoints, Pictures, ProgressLine
from ldm.training.loop.data_module import RunData
from ldm.training.loop.interruption import Interruption
from ldm.training.loop.logs import make_loggers
from ldm.training.loop.trainer import make_trainer, own_parts, uses_gpu
from ldm.training.method import Method
from ldm.training.methods import find_method
from ldm.training.networks import compile_blocks
from ldm.training.optimization import lr_factor
from ldm.training.run import begin
from ldm.training.run_config import RunConfig, complete
from ldm.training.run_folder import RunFolder

log = logging.getLogger(__name__)


def fit(cfg, keys: RunConfig) -> Path | None:
    """Train a checked config; see `ldm.training.train`."""
    interruption = Interruption()
    own = own_parts(cfg, "callbacks", pl.Callback)
    trainer = make_trainer(keys, find_method(keys.task), [interruption, *own], [])
    folder, config = RunFolder(keys.folder), complete(cfg, keys)
    if not trainer.is_global_zero:
        logging.getLogger("ldm").setLevel(logging.WARNING)
        _fit(cfg, keys, folder, config, trainer, interruption)
        return None
    with folder.held():
        _fit(cfg, keys, folder, config, trainer, interruption)
    return folder.path


def _fit(
    cfg,
    keys: RunConfig,
    folder: RunFolder,
    config: Mapping,
    trainer: pl.Trainer,
    interruption: Interruption,
) -> None:
    """What each process does; `config` is the complete one, for the folder."""
    writes, training = trainer.is_global_zero, keys.training
    state = folder.find(config) if writes else folder.newest_state()
    if state is not None and state["step"] >= training.steps:
        if writes:
            folder.finish(state)
            log.info(
                "%s is complete: step %d of %d. A larger training.steps continues it.",
                *(folder.path, state["step"], training.steps),
            )
        return
    run = begin(cfg, keys, trainer.strategy.root_device, resuming=state is not None)
    method = find_method(keys.task).build(run)
    if state is not None:
        method.resume_from(state)
        _tell_resumed(method, folder, state)
        del state
    if writes:
        folder.prepare(config)
        method.keep(folder.path)
    trainer.loggers = make_loggers(folder.logs, method.step, keys.logging.tensorboard) if writes else []
    trainer.loggers += own_parts(cfg, "loggers", Logger)
    _announce(method, trainer)
    if training.compile:
        compile_blocks(method)
    ours = [ProgressLine(), Pictures(folder), Checkpoints(folder, method.describe())]
    # After the question whether to stop, before the user's own.
    trainer.callbacks[1:1] = ours
    _step_until_done(method, folder, trainer, interruption)
    if interruption.asked is not None and method.step < training.steps and writes:
        raise KeyboardInterrupt(f"stopped at step {method.step}; the same command continues {folder.path}")


def _step_until_done(
    method: Method, folder: RunFolder, trainer: pl.Trainer, interruption: Interruption
) -> None:
    try:
        with interruption:
            trainer.fit(method, datamodule=RunData(method))
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt
        if interruption.asked is None:
            raise
        raise KeyboardInterrupt(f"stopped at once; the same command continues {folder.path}") from stop
    except BaseException:
        _end_others(trainer)
        raise


def _end_others(trainer: pl.Trainer) -> None:
    """End the processes that this one started: they would wait for it, on GPUs for half an hour."""
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        process.send_signal(signal.SIGKILL)


def _tell_resumed(method: Method, folder: RunFolder, state: Mapping) -> None:
    log.info("continuing %s at step %d of %d", folder.path, state["step"], method.settings.steps)
    steps, settings = folder.planned_steps(), method.settings
    if steps not in (None, settings.steps):
        before, now = (lr_factor(settings.optimizer, method.step, n) for n in (steps, settings.steps))
        if before != now:
            log.warning(
                "training.steps was %d: the learning rate, which follows it, jumps from %.3g to %.3g",
                *(steps, method.base_lr * before, method.base_lr * now),
            )
    before, now = state.get("data", method.data_identity), method.data_identity
    if before != now:
        log.warning(
            "the training data changed since that checkpoint (%d images then, %d now): the run goes on, with "
            "other images than it would have seen",
            *(before["images"], now["images"]),
        )


def _announce(method: Method, trainer: pl.Trainer) -> None:
    """What is about to happen, in a few lines."""
    keys, training = method.keys, method.settings
    trained = sum(p.numel() for group in method.trained() for p in group)
    held_out = len(method.validation_set) if method.validation_set is not None else 0
    log.info("%s: %s, %.2f M trained parameters", keys.folder, keys.task, trained / 1e6)
    log.info(
        "data: %d image%s to train on, %d held out; %d step%s of %d",
        *(len(method.train_set), "" if len(method.train_set) == 1 else "s", held_out),
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
