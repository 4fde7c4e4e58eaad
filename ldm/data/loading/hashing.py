"""Small deterministic hashes: what decides an order, a flip, a crop or a split is computed, never drawn.

The mixer is the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, with Stafford's constants). It runs on whole numpy arrays, so a batch costs as much
as a sample.
"""

import hashlib
import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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

    Args:
        seed: integer in [0, 2^63).
        stream: a name; different names give unrelated numbers.
        values: integers or integer arrays; negative ones wrap into 64 bits.
    """
    tag = zlib.crc32(stream.encode())
    state = np.array([(seed + (tag << 32)) % 2**64, tag], dtype=np.uint64)
    state = mix64(
        mix64(state[:1] + _GOLDEN) ^ state[1:]
    )  # shape (1,): arrays wrap silently, scalars would warn
    for value in values:
        word = np.atleast_1d(np.asarray(value)).astype(np.int64).view(np.uint64)
        state = mix64(state ^ mix64(word + _GOLDEN))
    return state


def uniform01(seed: int, stream: str, *values: np.ndarray | int) -> np.ndarray:
    """float64 numbers in [0, 1) with 53 random bits, addressed like `hash64`."""
    return (hash64(seed, stream, *values) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def name_hash(name: bytes) -> int:
    """A stable 64-bit hash of a name, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def flip_mask(seed: int, positions: np.ndarray) -> np.ndarray:
    """Which samples are mirrored: bool, a fair coin per position; position < 0 (the plain view) never is.

    Images and cached latents ask the same function, so both kinds of training see the same flips.
    """
    return (hash64(seed, "flip", positions) >> np.uint64(63)).astype(bool) & (positions >= 0)
