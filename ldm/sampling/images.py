"""From conditions to images."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.latents import count_of, sample, settled
from ldm.sampling.section import Sampling

# What a group of images may cost the network, in parameters times positions of the latent (about as many
# multiplications), and how many there are at most.
_GROUP_COST, _GROUP_MOST = 4e9, 16


def draw(
    model: LatentDiffusion,
    n: int | None = None,
    conditions: Mapping[str, Any] | Callable[[list[int]], Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    settings: Sampling | None = None,
    batch_size: int = 64,
    exact: bool | None = None,
    progress: Callable[[int, int], None] | bool = False,
    **asked: Any,
) -> Iterator[Tensor]:
    """Draw images: batches (B, C, H, W), about in [-1, 1], float32 on the CPU, in order.

    Image i depends on the seed, i and its conditions alone. `sample.py` draws with this function.

    Args:
        n: how many; taken from `conditions` where those are given as a batch.
        conditions: a batch that the model's conditioner reads, e.g. {"label": tensor (n,)}, or a function of
            the indices of some images that makes theirs. None for an unconditional model.
        settings, asked: as `sample`'s: sampler, steps, guidance, spacing, shift and options of the sampler.
        batch_size: images at a time. It changes pixels by rounding at most, and nothing if `exact`.
        exact: compute in groups of `group_size`, the last one filled up with images that are thrown away, so
            that image i always goes through the same arithmetic. None is True on the CPU.
        progress: called with (images drawn, n) after each batch; True shows a bar.

    Raises:
        ValueError: as `sample`; also images that are not finite, or more than the device's memory holds.
    """
    settings = settled(model, settings, **asked)
    n = count_of(n, None if callable(conditions) else conditions)
    keys = ", ".join(model.conditioner.keys)
    if bool(keys) != (conditions is not None):
        given = "conditions are missing" if keys else "conditions were given"
        raise ValueError(f"{given}, and this model is conditioned on {keys or 'nothing'}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    settings.sigmas(model)  # what the schedule refuses is told now, not in the first batch
    exact = model.device.type == "cpu" if exact is None else exact
    size = group_size(model) if exact else batch_size

    def batches() -> Iterator[Tensor]:
        from tqdm.auto import tqdm

        with tqdm(total=n, desc="sampling", unit="image", disable=progress is not True) as bar:
            for start in range(0, n, size):
                kept = min(size, n - start)
                computed = size if exact else kept
                with held_in_memory(computed), torch.no_grad():
                    indices = [min(start + i, n - 1) for i in range(computed)]
                    cond = _embedded(model, conditions, indices)
                    z = sample(model, computed, cond, seed=seed, first_index=start, settings=settings)
                    images = model.to_image(z)[:kept].float().cpu()
                if not images.isfinite().all():
                    raise ValueError(
                        f"images {start} to {start + kept - 1} are not finite: the model diverged in "
                        "training, or needs float32"
                    )
                bar.update(kept)
                if callable(progress):
                    progress(start + kept, n)
                yield images

    return batches()


def _embedded(model: LatentDiffusion, conditions, indices: list[int]) -> dict[str, Tensor] | None:
    """What the conditioner makes of the conditions of these images, on the model's device."""
    if conditions is None:
        return None
    if callable(conditions):
        batch = conditions(indices)
    else:
        batch = {
            name: values[indices] if torch.is_tensor(values) else [values[i] for i in indices]
            for name, values in conditions.items()
        }
    return model.conditioner({k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()})


@contextmanager
def held_in_memory(count: int) -> Iterator[None]:
    """Says in plain words when the device's memory does not hold `count` images at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the device's memory does not hold {count} images at a time ({error})") from error


def group_size(model: LatentDiffusion) -> int:
    """How many images are computed together where the same bits are wanted whatever the batch size.

    Kernels round differently for different batch shapes, so the shape has to be fixed, by the model alone.
    """
    cost = sum(p.numel() for p in model.network.parameters()) * math.prod(model.latent_shape[1:])
    most = min(_GROUP_MOST, max(1.0, _GROUP_COST / max(cost, 1)))
    return 2 ** int(math.log2(most))
