"""What is computed instead of drawn: the order of samples, their flips and crops.

A number is a hash of its address, such as (seed, stream, position of the sample in the run), so one integer
resumes a run. The mixer is the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014, with Stafford's constants).
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Half-rounds of the Feistel network. Four hide the order when the halves are large (Luby and Rackoff 1988);
# small halves need many more before every index is as likely in every place.
_HALF_ROUNDS, _HALF_ROUNDS_SMALL, _SMALL = 8, 24, 10_000
_BLOCK = 8192  # samples whose order is computed at once: numpy's calls cost more than a few numbers


def check_seed(seed: int) -> int:
    """`seed` as an int in [0, 2^63); ValueError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2^63), got {seed!r}")
    return int(seed)


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(seed: int, stream: str, *values: np.ndarray | int) -> np.ndarray:
    """uint64 hash of (seed, stream name, values...); the values broadcast against each other.

    Different streams give unrelated numbers; negative values wrap into 64 bits.
    """
    tag = zlib.crc32(stream.encode())
    # Of shape (1,): arrays wrap silently, scalars would warn.
    first, second = np.array([[(seed + (tag << 32)) % 2**64], [tag]], dtype=np.uint64)
    state = mix64(mix64(first + _GOLDEN) ^ second)
    for value in values:
        word = np.atleast_1d(np.asarray(value)).astype(np.int64).view(np.uint64)
        state = mix64(state ^ mix64(word + _GOLDEN))
    return state


def uniform01(seed: int, stream: str, *values: np.ndarray | int) -> np.ndarray:
    """float64 numbers in [0, 1) with 53 random bits, addressed like `hash64`."""
    return (hash64(seed, stream, *values) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def flip_mask(seed: int, positions: np.ndarray) -> np.ndarray:
    """Which samples are mirrored: bool, a fair coin per position; position < 0 (the plain view) never is.

    Images and cached latents ask the same function, so both kinds of training see the same flips.
    """
    return (hash64(seed, "flip", positions) >> np.uint64(63)).astype(bool) & (positions >= 0)


def permuted(slots: np.ndarray, num_samples: int, seed: int, epochs: np.ndarray | int) -> np.ndarray:
    """Where a pseudo-random permutation of range(num_samples) sends each of `slots`.

    A Feistel network over Z_a x Z_b with a * b just above num_samples, whose outputs beyond num_samples are
    sent through it again until they fall inside ("cycle walking", Black and Rogaway 2002). Nothing is stored,
    so any slot of any epoch costs the same, whatever the size of the dataset.

    Args:
        slots: integers (B,) in [0, num_samples).
        seed: which family of permutations.
        epochs: which permutation of the family; one number or an array (B,).

    Returns:
        int64 (B,).
    """
    slots = np.asarray(slots, dtype=np.int64)
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


@dataclass(eq=False)
class PositionSampler(Sampler):
    """Batch sampler: for each step, this rank's list of (index, position).

    `position` counts samples since the start of the run: position = step * batch_size + offset in the global
    batch, of which rank r takes the r-th contiguous slice. The epoch is position // num_samples, and within
    an epoch every index comes exactly once, in the order of `permuted(seed, epoch)`. A batch may span epochs.

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

    num_samples: int
    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    start_step: int = 0
    steps: int | None = None

    def __post_init__(self):
        batch, world = self.batch_size, self.world_size
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}: the dataset is empty")
        if world < 1 or not 0 <= self.rank < world:
            raise ValueError(f"rank must lie in [0, world_size), got rank {self.rank} of world_size {world}")
        if batch < 1 or batch % world:
            raise ValueError(f"batch_size must be a positive multiple of {world} processes, got {batch}")
        if min(self.start_step, self.steps or 0) < 0:
            raise ValueError(
                f"start_step and steps must not be negative, got {self.start_step}, {self.steps}"
            )
        self.seed = check_seed(self.seed)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This rank's (index, position) pairs of one step, in O(batch) time and memory."""
        return self._batches(step, 1)[0]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, block = self.start_step, max(1, _BLOCK // self.batch_size)
        while self.steps is None or step < self.steps:
            count = block if self.steps is None else min(block, self.steps - step)
            yield from self._batches(step, count)
            step += count

    def _batches(self, step: int, count: int) -> list[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        steps = np.arange(step, step + count, dtype=np.int64)[:, None]
        positions = (steps * self.batch_size + self.rank * share + np.arange(share)).reshape(-1)
        epochs, slots = np.divmod(positions, self.num_samples)
        indices = permuted(slots, self.num_samples, self.seed, epochs)
        pairs = list(zip(indices.tolist(), positions.tolist(), strict=True))
        return [pairs[i * share : (i + 1) * share] for i in range(count)]

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("a PositionSampler without `steps` never ends and has no length")
        return max(0, self.steps - self.start_step)


class SequentialBatches(Sampler):
    """Batch sampler over the plain view: `indices`, or range(indices), in order; the last may be smaller."""

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
