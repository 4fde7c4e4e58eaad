"""The order of samples as a pure function of (seed, epoch, position): one integer resumes it."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ldm.data.loading.hashing import check_seed, hash64, mix64

# Half-rounds of the Feistel network. Four hide the order when the halves are large (Luby and Rackoff 1988);
# the halves of a few samples are so small that they need many more before every index is as likely in every
# place.
_HALF_ROUNDS, _HALF_ROUNDS_SMALL, _SMALL = 8, 24, 10_000
_BLOCK = 8192  # samples whose order is computed at once


def permuted(slots: np.ndarray, num_samples: int, seed: int, epochs: np.ndarray | int) -> np.ndarray:
    """Where a pseudo-random permutation of range(num_samples) sends each of `slots`.

    A Feistel network over Z_a x Z_b with a * b just above num_samples, whose outputs beyond num_samples are
    sent through it again until they fall inside ("cycle walking", Black and Rogaway 2002). Nothing is stored,
    so any slot of any epoch costs the same few multiplications, whatever the size of the dataset.

    Args:
        slots: integers in [0, num_samples), any shape (B,).
        num_samples: size of the permuted set, at least 1.
        seed: which family of permutations.
        epochs: which permutation of the family; one number or an array (B,).

    Returns:
        int64 (B,).
    """
    slots = np.asarray(slots, dtype=np.int64)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if slots.size and not (slots.min() >= 0 and slots.max() < num_samples):
        raise ValueError(f"slots must lie in [0, {num_samples})")
    a = int(np.ceil(np.sqrt(num_samples)))
    b = -(-num_samples // a)
    rounds = np.arange(_HALF_ROUNDS if num_samples >= _SMALL else _HALF_ROUNDS_SMALL)[:, None]
    keys = np.broadcast_to(hash64(seed, "order", epochs, rounds), (len(rounds), *slots.shape))
    result = slots.copy()
    outside = np.arange(len(slots))
    while len(outside):
        result[outside] = _feistel(result[outside], a, b, keys[:, outside])
        outside = outside[result[outside] >= num_samples]
    return result


def _feistel(x: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    left, right = x // b, x % b  # in Z_a, in Z_b
    for i in range(0, len(keys), 2):
        left = (left + _round(keys[i], right, a)) % a
        right = (right + _round(keys[i + 1], left, b)) % b
    return left * b + right


def _round(key: np.ndarray, half: np.ndarray, modulus: int) -> np.ndarray:
    return (mix64(key ^ half.view(np.uint64)) % np.uint64(modulus)).astype(np.int64)


class PositionSampler(Sampler):
    """Batch sampler: for each step, this rank's list of (index, position).

    `position` counts samples since the start of the run: position = step * batch_size + offset in the global
    batch. The epoch is position // num_samples, and within an epoch every index comes exactly once, in the
    order of `permuted(seed, epoch)`. A batch may span epochs or be larger than the dataset. Which samples
    form a global batch depends on neither the number of ranks nor on where the run was resumed: rank r takes
    the r-th contiguous slice.

    Args:
        num_samples: size of the dataset.
        seed: integer in [0, 2^63).
        batch_size: samples in a global batch, over all ranks; a multiple of world_size.
        rank, world_size: this process among all.
        start_step: first step that `iter` yields; set it to resume.
        steps: stop before this step (counted from 0, not from start_step); None never stops.

    Raises:
        ValueError: an argument out of range, or batch_size no multiple of world_size.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        steps: int | None = None,
    ):
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}: the dataset is empty")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of world_size {world_size}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size counts the samples of all processes together and must be a positive multiple of "
                f"their number: {batch_size} over {world_size} processes (the nearest that fits is "
                f"{max(1, round(batch_size / world_size)) * world_size})"
            )
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        if steps is not None and steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        self.num_samples = num_samples
        self.seed = check_seed(seed)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.steps = steps

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This rank's (index, position) pairs of one step, in O(batch) time and memory."""
        return self._batches(step, 1)[0]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        block = max(
            1, _BLOCK // self.batch_size
        )  # numpy calls on a few hundred numbers cost more than the numbers
        while self.steps is None or step < self.steps:
            count = block if self.steps is None else min(block, self.steps - step)
            yield from self._batches(step, count)
            step += count

    def _batches(self, step: int, count: int) -> list[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        steps = np.arange(step, step + count, dtype=np.int64)[:, None]
        positions = (steps * self.batch_size + self.rank * share + np.arange(share)).reshape(
            -1
        )  # (count * share,)
        indices = permuted(
            positions % self.num_samples, self.num_samples, self.seed, positions // self.num_samples
        )
        pairs = list(zip(indices.tolist(), positions.tolist(), strict=True))
        return [pairs[i * share : (i + 1) * share] for i in range(count)]

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("a PositionSampler without `steps` never ends and has no length")
        return max(0, self.steps - self.start_step)


class SequentialBatches(Sampler):
    """Batch sampler over the plain view: every index once, in order, as bare indices.

    Args:
        indices: number of samples, or the indices to visit.
        batch_size: samples in a batch; the last may be smaller.
    """

    def __init__(self, indices: int | np.ndarray, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.indices = np.arange(indices) if isinstance(indices, int) else np.asarray(indices)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.indices[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)
