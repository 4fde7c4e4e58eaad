"""Random numbers that are addressed instead of drawn.

Every number is a pure function of (seed, stream, position, element), so what a training step or a
sampled image sees does not depend on what was drawn before it, on the batch size, on the number of
processes or on the device. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), written with int64 tensor operations so that it runs wherever torch does.
"""

import math
import zlib

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10: four 32-bit words per counter, held in int64 tensors; all values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 64-bit product wraps in int64, but its bits are right; mask after the arithmetic shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, stream: str, positions: torch.Tensor, count: int, device=None) -> torch.Tensor:
    """int64 words in [0, 2^32) of shape (4, B, count)."""
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise ValueError(f"positions must be int64 (B,), got {positions.dtype} of {tuple(positions.shape)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    positions = positions.to(device) if device is not None else positions
    element = torch.arange(count, device=positions.device)[None, :].expand(len(positions), -1)
    position = positions[:, None].expand(-1, count)
    # The stream's name goes into the counter so that the key holds the whole seed.
    tag = torch.full_like(element, zlib.crc32(stream.encode()))
    key = (seed & _MASK, (seed >> 32) & _MASK)
    return torch.stack(philox((element, position & _MASK, (position >> 32) & _MASK, tag), key))


def uniform(
    seed: int, stream: str, positions: torch.Tensor, shape: tuple[int, ...] = (), device=None
) -> torch.Tensor:
    """Numbers in the open interval (0, 1), float32 of shape (B, *shape), for int64 `positions` (B,)."""
    words = _words(seed, stream, positions, -(-math.prod(shape) // 4), device)
    # 24 bits: float32 holds them exactly, and the half keeps 0 and 1 out.
    return _shaped(((words >> 9).float() + 0.5) * 2.0**-23, shape)


def normal(
    seed: int, stream: str, positions: torch.Tensor, shape: tuple[int, ...], device=None
) -> torch.Tensor:
    """Standard normal numbers (Box-Muller), float32 of shape (B, *shape), for int64 `positions` (B,)."""
    words = _words(seed, stream, positions, -(-math.prod(shape) // 4), device)
    # All 32 bits in the radius: the tail then reaches 6.7 standard deviations.
    radius_bits = (words[0::2].double() + 0.5) * 2.0**-32
    radius = (-2.0 * radius_bits.log()).sqrt().float()
    angle = words[1::2].float() * (2.0 * math.pi * 2.0**-32)
    return _shaped(torch.cat([radius * angle.cos(), radius * angle.sin()]), shape)


def _shaped(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(4, B, count), at least as many as are wanted -> (B, *shape)."""
    return values.permute(1, 2, 0).flatten(1)[:, : math.prod(shape)].reshape(values.shape[1], *shape)


def subseed(seed: int, stream: str, position: int) -> int:
    """A 63-bit seed for a generator that must be seeded the ordinary way (torch.manual_seed)."""
    counter = (0, position & _MASK, (position >> 32) & _MASK, zlib.crc32(stream.encode()))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))  # on Python's integers, much faster for one
    return ((words[0] << 32) | words[1]) & (2**63 - 1)
