"""Batches of a run, addressed by their place in it."""

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from ldm.data import PositionSampler, SequentialBatches, make_loader
from ldm.training.method import Method


class RunData(pl.LightningDataModule):
    """Training batches from the method's step on, and held-out batches in a fixed order.

    Loaders are made after the processes are up, so that each knows its rank.

    Attributes:
        validation_share: how many of this process's held-out batches count. Every process goes through as
            many; one whose share is shorter repeats some, for the others wait for it.
    """

    def __init__(self, method: Method):
        super().__init__()
        self.method, self.training, self.validation_share = method, method.settings, 0

    def train_dataloader(self) -> DataLoader:
        sampler = PositionSampler(
            len(self.method.train_set),
            self.method.seed,
            self.training.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start_step=self.method.step,
            steps=self.training.steps,
        )
        ranks = self.trainer.num_devices  # of this machine
        return make_loader(self.method.train_set, sampler, self.training.workers, ranks_on_node=ranks)

    def val_dataloader(self) -> DataLoader | list:
        """Held-out images in an order that does not follow the classes.

        Which images these are depends on neither the number of devices nor that of accumulation steps; a
        batch is as large as what one device works through at once in training.
        """
        held_out, logging = self.method.validation_set, self.method.keys.logging
        if held_out is None or logging.validate_every is None:
            return []
        rank, world = self.trainer.global_rank, self.trainer.world_size
        order = np.random.default_rng(0).permutation(len(held_out))
        if logging.validation_batches is not None:
            order = order[: logging.validation_batches * self.training.batch_size]
        size = max(1, self.training.batch_size // (world * self.training.accumulate))
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        own = chunks[rank::world]
        self.validation_share = len(own)
        while len(own) < -(-len(chunks) // world):
            own.append(chunks[0])
        return make_loader(held_out, _Chunks(own), self.training.workers)


class _Chunks(SequentialBatches):
    """Batches that are given one by one."""

    def __init__(self, chunks: list[np.ndarray]):
        super().__init__(np.concatenate(chunks), max(map(len, chunks)))
        self.chunks = chunks

    def __iter__(self):
        return (chunk.tolist() for chunk in self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)
