"""Ctrl-C and SIGTERM: the run ends after its current step, with a checkpoint."""

import signal
import threading

import pytorch_lightning as pl
import torch

from ldm.training.method import Method


class Interruption(pl.Callback):
    """As a context, takes the two signals; as a callback, ends the run. A second Ctrl-C ends it at once.

    asked: the signal that asked for the end, or None.
    """

    AGREE_EVERY = 10  # steps between the processes' asking each other whether one was told to stop

    def __init__(self):
        self.asked: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _ask(self, number, frame) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def on_train_batch_end(self, trainer, method: Method, outputs, batch, batch_idx) -> None:
        if self._agreed(trainer, method):
            self.asked = self.asked or signal.SIGTERM
            trainer.should_stop = True
            # Lightning validates at every end; whoever waits for this one has no use for it unless it is due.
            every = method.keys.logging.validate_every
            due = method.step >= method.settings.steps or (every is not None and method.step % every == 0)
            if not due:
                trainer.limit_val_batches = 0

    def _agreed(self, trainer, method: Method) -> bool:
        if trainer.world_size == 1:
            return self.asked is not None
        if method.step % self.AGREE_EVERY:
            return False
        # All processes have to stop at one and the same step, also if only one of them got the signal.
        asked = torch.tensor(float(self.asked is not None), device=method.device)
        return bool(trainer.strategy.reduce(asked, reduce_op="sum") > 0)


def own_signals(trainer: pl.Trainer) -> None:
    """Keep Lightning off the signals, and off asking every process in every step about them.

    Its handlers would end a run without our checkpoint or save inside of the handler, and in its question all
    processes wait for the GPU at every step: a stopped run could not go on in the same bits.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
