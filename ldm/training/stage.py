"""What every kind of run has: its stage, its data, and the weights that it may start from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torch import nn
from torch.utils.data import Dataset

from ldm import config as configuration
from ldm.checkpoints import load
from ldm.checkpoints.strict import load_strict
from ldm.data import SequentialBatches, make_loader
from ldm.training.run_config import RunConfig
from ldm.training.settings import LoggingSettings, TrainingSettings
from ldm.training.task import Task

#: What a data set must have besides items, to be trained on.
DATA_SET = ("split", "set_seed", "fingerprint", "classes", "size", "channels")


@dataclass
class Stage:
    """All that a run trains with.

    train, validation: data sets; the samples of `train` are asked for by (index, position).
    task: the LightningModule. description: what the saved model says of itself.
    data: identity of the training data, kept in checkpoints. draw: makes the grids, and has a name.
    keep: writes into the run folder what the run needs besides; None for nothing.
    """

    train: Dataset
    validation: Dataset | None
    task: Task
    description: dict
    data: dict
    draw: Callable[[Task], Image]
    keep: Callable[[Path], None] | None = None

    def held_out(
        self, training: TrainingSettings, logging: LoggingSettings
    ) -> Callable[[int, int], tuple[Iterable[dict], bool]] | None:
        """Batches of held-out images for `Validation`, in a fixed order that does not follow the classes.

        Which images these are depends on neither the number of devices nor that of accumulation steps; a
        batch is as large as what one device works through at once in training.
        """
        if self.validation is None:
            return None
        order = np.random.default_rng(0).permutation(len(self.validation))
        if logging.validation_batches is not None:
            order = order[: logging.validation_batches * training.batch_size]

        def batches(rank: int, world: int) -> tuple[Iterable[dict], bool]:
            size = max(1, training.batch_size // (world * training.accumulate))
            chunks = [order[i : i + size] for i in range(0, len(order), size)]
            own = chunks[rank::world]
            indices = np.concatenate(own or chunks[:1])
            return make_loader(self.validation, SequentialBatches(indices, size), training.workers), bool(own)

        return batches


def build_data(run: RunConfig, cfg) -> tuple[Dataset, Dataset | None]:
    """The data set's training and validation parts."""
    whole = configuration.instantiate(cfg.data, allow_foreign=True)
    lacks = [name for name in DATA_SET if not hasattr(whole, name)]
    if lacks:
        raise ValueError(f"data.target {cfg.data.target} lacks {', '.join(lacks)}: see ldm.data.ImageFolder")
    whole.set_seed(run.seed)
    train, validation = whole.split("train"), whole.split("validation")
    if len(train) == 0:
        raise ValueError("data: no image is left to train on")
    return train, validation if len(validation) else None


def identity_of(train: Dataset) -> dict:
    return {"images": len(train), "fingerprint": train.fingerprint()}


def start_from(model: nn.Module, path: str, cfg) -> None:
    """Fill a model with the weights of another run; what this run's config names may be in that one too."""
    load_strict(model, load(path, configuration.to_plain(cfg)).state_dict(), where=path)
