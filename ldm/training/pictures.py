"""The grids that a run writes: reconstructions of held-out images, and samples."""

import copy

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from torch.utils.data import Dataset

from ldm.data import SequentialBatches, make_loader
from ldm.data.grid import image_grid
from ldm.latent_diffusion import LatentDiffusion, sample
from ldm.training.autoencoder import AutoencoderTask
from ldm.training.diffusion import DiffusionTask
from ldm.training.settings import SamplingSettings


class Reconstructions:
    """Originals above, their reconstructions below: the same few images, spread over the set, each time."""

    name = "reconstruction"

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count = dataset, min(count, len(dataset))
        self._batch: dict | None = None

    def __call__(self, task: AutoencoderTask) -> Image:
        if self._batch is None:
            indices = np.linspace(0, len(self.dataset) - 1, self.count).astype(int)
            self._batch = next(iter(make_loader(self.dataset, SequentialBatches(indices, self.count), 0)))
        images = self._batch["image"].to(task.device)
        addressed = {"image": images, "position": self._batch["index"].to(task.device)}
        reconstruction, _ = task.model(images, noise=task.noise(addressed, "validation"))
        return image_grid(torch.cat([images, reconstruction.float()]), columns=self.count)


class Samples:
    """Samples at fixed noise, of each class in turn."""

    name = "samples"

    def __init__(self, settings: SamplingSettings, count: int, classes: list[str] | None, seed: int):
        self.settings, self.count, self.classes, self.seed = settings, count, classes or [], seed

    def __call__(self, task: DiffusionTask) -> Image:
        z = self._sample(task.model, self.count)
        return image_grid(task.model.to_image(z).float(), columns=max(1, round(self.count**0.5)))

    def rehearse(self, model: LatentDiffusion) -> None:
        """Go through the sampler without the network: settings that do not fit are told now, not at the first
        grid of a long run.
        """
        if self.settings.guidance != 1.0 and not model.conditioner.drops:
            raise ValueError(
                f"sampling.guidance {self.settings.guidance} leans on the absence of a condition, which this "
                "model does not learn (no conditioner, or drop 0 in it); set sampling.guidance=1"
            )
        stand_in = copy.copy(model)
        stand_in._modules = {**model._modules, "model": _Zeros(1 + model.denoiser.learned_variance)}
        stand_in.latent_shape = (model.latent_shape[0], 1, 1)
        try:
            self._sample(stand_in, 1)
        except ValueError as error:
            raise ValueError(f"sampling: {error}") from error

    def _sample(self, model: LatentDiffusion, count: int) -> torch.Tensor:
        settings, cond = self.settings, None
        if model.conditioner.keys:
            labels = torch.arange(count, device=model.device) % max(len(self.classes), 1)
            cond = model.conditioner({"label": labels})
        return sample(
            model,
            count,
            cond,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            spacing=settings.spacing,
            eta=settings.eta,
            seed=self.seed,
        )


class _Zeros(nn.Module):
    """In a network's place: zeros, `parts` times as many channels as it was given."""

    def __init__(self, parts: int):
        super().__init__()
        self.parts = parts

    def forward(self, z: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z).repeat(1, self.parts, 1, 1)
