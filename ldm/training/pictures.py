"""The grids that a run writes: reconstructions of held-out images, and samples."""

import copy
import math

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from torch.utils.data import Dataset

from ldm.data import SequentialBatches, make_loader
from ldm.data.images.grid import image_grid, led_rows, pixel_grid, to_uint8
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling import Sampling, sample
from ldm.training.autoencoder import AutoencoderTask
from ldm.training.conditions import misfits
from ldm.training.diffusion import DiffusionTask


def spread(dataset: Dataset, count: int) -> dict:
    """A batch of the plain view of `count` images, spread over the set."""
    indices = np.linspace(0, len(dataset) - 1, count).astype(int)
    return next(iter(make_loader(dataset, SequentialBatches(indices, count), 0)))


class Reconstructions:
    """Originals above, their reconstructions below: the same few images, spread over the set, each time."""

    name = "reconstruction"

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count = dataset, min(count, len(dataset))
        self._batch: dict | None = None

    def __call__(self, task: AutoencoderTask) -> Image:
        if self._batch is None:
            self._batch = spread(self.dataset, self.count)
        images = self._batch["image"].to(task.device)
        addressed = {"image": images, "position": self._batch["index"].to(task.device)}
        reconstruction, _ = task.model(images, noise=task.noise(addressed, "validation"))
        return image_grid(torch.cat([images, reconstruction.float()]), columns=self.count)


class Samples:
    """Samples at fixed noise.

    Of a model that is conditioned on classes alone, each class in turn. Other conditions are those of a few
    images of `dataset`, the same each time; where they are the images themselves, each image stands in front
    of a row of its samples.
    """

    name = "samples"

    def __init__(
        self, settings: Sampling, count: int, classes: list[str] | None, seed: int, dataset: Dataset
    ):
        self.settings, self.count, self.classes, self.seed = settings, count, classes or [], seed
        self.dataset = dataset
        self._shown: dict | None = None

    def __call__(self, task: DiffusionTask) -> Image:
        model = task.model
        batch = self._batch(model)
        images = to_uint8(model.to_image(self._sample(model, self._conditions(model, batch), self.count)))
        if "image" not in model.conditioner.keys:
            return pixel_grid(images, columns=max(1, round(self.count**0.5)))
        each = self._each(model)
        return led_rows(to_uint8(batch["image"][::each]), images, each)

    @torch.no_grad()
    def rehearse(self, model: LatentDiffusion) -> None:
        """Hold the conditions against the network, and go through the sampler without it: what does not fit
        is told now, not in the first step or at the first grid of a long run.
        """
        cond = self._conditions(model, {name: values[:1] for name, values in self._batch(model).items()})
        problems = list(misfits(model.network, model.latent_shape[0], cond))
        if self.settings.guidance != 1.0 and not model.conditioner.drops:
            problems.append(
                f"sampling.guidance {self.settings.guidance} leans on the absence of a condition, which this "
                "model does not learn (no conditioner, or drop 0 in it); set sampling.guidance=1"
            )
        if problems:
            raise ValueError("\n".join(problems))
        stand_in = copy.copy(model)
        stand_in._modules = {**model._modules, "model": _Zeros(1 + model.denoiser.learned_variance)}
        stand_in.latent_shape = (model.latent_shape[0], 1, 1)
        try:
            self._sample(stand_in, cond, 1)
        except ValueError as error:
            raise ValueError(f"sampling: {error}") from error

    def _each(self, model: LatentDiffusion) -> int:
        """Samples of one image of `dataset`: about a square of them, where the image stands beside them."""
        rows = max(1, int(self.count**0.5)) if "image" in model.conditioner.keys else self.count
        return math.ceil(self.count / min(rows, len(self.dataset)))

    def _batch(self, model: LatentDiffusion) -> dict:
        """What the conditioner reads, for every sample."""
        if set(model.conditioner.keys) <= {"label"}:
            return {"label": torch.arange(self.count, device=model.device) % max(len(self.classes), 1)}
        each = self._each(model)
        if self._shown is None:
            self._shown = spread(self.dataset, math.ceil(self.count / each))
        which = [i // each for i in range(self.count)]
        return {
            name: values[which].to(model.device) if torch.is_tensor(values) else [values[i] for i in which]
            for name, values in self._shown.items()
        }

    def _conditions(self, model: LatentDiffusion, batch: dict) -> dict[str, torch.Tensor] | None:
        return model.conditioner(batch) if model.conditioner.keys else None

    def _sample(
        self, model: LatentDiffusion, cond: dict[str, torch.Tensor] | None, count: int
    ) -> torch.Tensor:
        return sample(model, count, cond, settings=self.settings, seed=self.seed)


class _Zeros(nn.Module):
    """In a network's place: zeros, `parts` times as many channels as it was given."""

    def __init__(self, parts: int):
        super().__init__()
        self.parts = parts

    def forward(self, z: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z).repeat(1, self.parts, 1, 1)
