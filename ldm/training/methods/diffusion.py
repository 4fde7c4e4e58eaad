"""Second stage: the diffusion model in the latent space of a frozen first stage."""

import copy
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ldm.config.other_runs import not_repeated
from ldm.data.images.grid import led_rows, pixel_grid, to_uint8
from ldm.diffusion.objective import Objective
from ldm.diffusion.random import normal, uniform
from ldm.diffusion.schedule import resolution_shift
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.dit import DiT
from ldm.nn.precision import autocast_off
from ldm.sampling import Sampling, sample
from ldm.training.method import Figures, Method
from ldm.training.methods.autoencoder import check_images
from ldm.training.methods.first_stage import FirstStage, load_encoders
from ldm.training.methods.misfits import check_conditions, misfits
from ldm.training.networks import channels_last
from ldm.training.run import Run, spread
from ldm.training.run_config import RunConfig

log = logging.getLogger(__name__)

#: What a diffusion model is made of besides its first stage.
PARTS = ("network", "denoiser", "conditioner")


@dataclass(kw_only=True)
class DiffusionKeys(RunConfig):
    """
    first_stage: run folder (or file) of the trained autoencoder; null diffuses pixels.
    first_stage_config: its YAML, for a file that does not describe itself (of another project) and for an
        autoencoder with classes of yours.
    network, denoiser, objective: target and params.
    conditioner: likewise, or null for an unconditional model.
    cache: encode the data once and train from the latents; false encodes every batch anew.
    cache_dtype: `auto` keeps float32 up to 1 GiB of latents and float16 beyond.
    latent_scale: `auto` measures mean and standard deviation of each latent channel and normalises by them; a
        number is one scale for all, with shift 0 (0.18215 in Stable Diffusion 1).
    sampling: defaults of sample.py for this model.
    init_from: weights to start from, a run folder or a file: a model of the same first stage, network and
        conditioner. Its latents' shift and scale are taken over where `latent_scale` is `auto`.
    """

    first_stage: str | None
    first_stage_config: str | None = None
    network: dict
    denoiser: dict
    objective: dict
    conditioner: dict | None = None
    cache: bool = True
    cache_dtype: Literal["auto", "float32", "float16"] = "auto"
    latent_scale: float | Literal["auto"] = "auto"
    sampling: Sampling = field(default_factory=Sampling)
    init_from: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.latent_scale != "auto" and not self.latent_scale > 0:
            raise ValueError(f"latent_scale must be a number above 0, or auto, got {self.latent_scale}")

    @property
    def cached(self) -> bool:
        """Whether training reads latents from disk; models of pixels have none."""
        return self.cache and self.first_stage is not None


class DiffusionMethod(Method):
    """Trains `model.network` and `model.conditioner`; the first stage is frozen.

    Batches hold either `mean` and `std` of cached posteriors (B, C, h, w) or `image` (B, C, H, W) in [-1, 1],
    besides what the conditioner reads.
    """

    Keys = DiffusionKeys
    supplies = {"objective": ["denoiser"]}
    offers = {"network": ["num_classes"], "conditioner*": ["num_classes"], "objective*": ["shift"]}
    picture = "samples"

    def __init__(self, run: Run, model: LatentDiffusion, objective: Objective, first_stage: FirstStage):
        super().__init__(run, model)
        model.first_stage_model.requires_grad_(False)
        self.objective, self._first_stage = objective, first_stage
        self.train()
        self._sampling: Sampling = run.keys.sampling
        self.sampling = asdict(self._sampling)
        self._shown_set, self._shown_batch = run.shown, None

    @classmethod
    def build(cls, run: Run) -> "DiffusionMethod":
        keys = run.keys
        first_stage = FirstStage.of(run)
        check_images(first_stage.model, run.train)
        if not run.resuming and (lacks := not_repeated(keys, run.cfg)):
            said = ", ".join(lacks)
            log.warning("note: the first stage was trained with %s, which this config does not say", said)
        run.provide("network", "num_classes", lambda: run.count_classes() + _absent_rows(run))
        run.provide("conditioner*", "num_classes", run.count_classes)
        network, denoiser, conditioner = run.build(*PARTS)
        size = [run.train.size, run.train.size]
        model = channels_last(LatentDiffusion(first_stage.model, network, denoiser, conditioner, size))
        if not run.holds_values:
            model.to(run.device)
        shift = resolution_shift(*model.latent_shape)
        run.provide("objective*", "shift", lambda: shift)
        if keys.sampling.shift == "auto":
            keys.sampling = replace(keys.sampling, shift=shift)
        check_conditions(model.conditioner, run.train, keys.cached)
        if keys.init_from is None and not run.resuming and run.holds_values:
            load_encoders(model.conditioner)
        objective = run.instantiate("objective", denoiser=model.denoiser)
        method = cls(run, model, objective, first_stage)
        method.rehearse()
        _start(run, model, first_stage)
        method.train_set, method.validation_set = first_stage.prepare(run, model)
        return method

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.first_stage_model.eval()
        return self

    # -- the step ------------------------------------------------------------------------------------------

    def loss(self, batch: dict) -> tuple[Tensor, Figures]:
        errors = self.errors(batch, "train")
        return errors["loss"].mean(), {"loss": errors["loss"]}

    def validate(self, batch: dict) -> Figures:
        return {"loss": self.errors(batch, "validation")["simple"]}

    def errors(self, batch: dict, stream: str) -> Figures:
        """The objective's per-sample results at the times, noises and drops of these positions."""
        positions, embedders = batch["position"], len(self.model.conditioner.embedders)
        shape = (2, *self.latent_shape(batch))
        noise, spread = normal(self.seed, f"{stream}/noise", positions, shape).unbind(1)
        draws = uniform(self.seed, f"{stream}/time", positions, (1 + embedders,)).T
        z = self.latents(batch, spread)
        cond = self.model.conditioner(batch, draws[1:] if stream == "train" else None)
        return self.objective(self.model.model, z, noise, draws[0], cond)

    def latent_shape(self, batch: dict) -> tuple[int, ...]:
        """(C, h, w) of this batch's latents."""
        if "mean" in batch:
            return tuple(batch["mean"].shape[1:])
        factor = self.model.first_stage_model.downsampling_factor
        return (self.model.latent_shape[0], *(side // factor for side in batch["image"].shape[-2:]))

    def latents(self, batch: dict, noise: Tensor) -> Tensor:
        """A sample of each posterior, normalised: z (B, C, h, w)."""
        if "mean" in batch:
            return self.model.normalize(batch["mean"] + batch["std"] * noise)
        with autocast_off(noise):  # in float32, as a cache is encoded
            return self.model.to_latent(batch["image"], noise)

    def parts(self) -> dict[str, nn.Module]:
        conditioner = {"conditioner": self.model.conditioner} if self.model.conditioner.keys else {}
        first_stage = {"first stage": self.model.first_stage_model} if self.keys.first_stage else {}
        return {"network": self.model.network, **conditioner, **first_stage}

    def example(self, count: int) -> dict:
        batch = super().example(count)
        for embedder in self.model.conditioner.embedders:
            if not {embedder.key, *embedder.also} & set(batch):
                batch[embedder.key] = embedder.null_values(count, self.model.device)
        return batch

    def keep(self, folder: Path) -> None:
        self._first_stage.keep(folder)

    # -- pictures ------------------------------------------------------------------------------------------

    def draw(self) -> Image:
        """Samples at fixed noise.

        Of a model that is conditioned on classes alone, each class in turn. Other conditions are those of a
        few images, the same each time; where they are the images themselves, each stands in front of a row of
        its samples.
        """
        count = self.keys.logging.images
        batch = self._conditions()
        cond = self.model.conditioner(batch) if self.model.conditioner.keys else None
        images = to_uint8(self.model.to_image(self._sample(self.model, cond, count)))
        if "image" not in self.model.conditioner.keys:
            return pixel_grid(images, columns=max(1, round(count**0.5)))
        each = self._each()
        return led_rows(to_uint8(batch["image"][::each]), images, each)

    @torch.no_grad()
    def rehearse(self) -> None:
        """Hold the conditions against the network, and go through the sampler without it: what does not fit
        is told now, not in the first step or at the first grid of a long run.
        """
        model = self.model
        values = model.device.type != "meta"  # for a plan there are none, and no sampler goes without
        batch = {n: shown[:1] for n, shown in self._conditions().items()} if values else self.example(1)
        cond = model.conditioner(batch) if model.conditioner.keys else None
        problems = list(misfits(model.network, model.latent_shape[0], cond))
        if self._sampling.guidance != 1.0 and not model.conditioner.drops:
            problems.append(
                f"sampling.guidance {self._sampling.guidance} leans on the absence of a condition, which "
                "this model does not learn (no conditioner, or drop 0 in it); set sampling.guidance=1"
            )
        if problems:
            raise ValueError("\n".join(problems))
        if not values:
            return
        stand_in = copy.copy(model)
        stand_in._modules = {**model._modules, "model": _Zeros(1 + model.denoiser.learned_variance)}
        stand_in.latent_shape = (model.latent_shape[0], 1, 1)
        try:
            self._sample(stand_in, cond, 1)
        except ValueError as error:
            raise ValueError(f"sampling: {error}") from error

    def _each(self) -> int:
        """Samples of one image: about a square of them, where the image stands beside them."""
        count = self.keys.logging.images
        rows = max(1, int(count**0.5)) if "image" in self.model.conditioner.keys else count
        return math.ceil(count / min(rows, len(self._shown_set)))

    def _conditions(self) -> dict:
        """What the conditioner reads, for every sample of the picture."""
        count, device = self.keys.logging.images, self.model.device
        if set(self.model.conditioner.keys) <= {"label"}:
            return {"label": torch.arange(count, device=device) % max(len(self.classes or []), 1)}
        each = self._each()
        if self._shown_batch is None:
            self._shown_batch = spread(self._shown_set, math.ceil(count / each))
        which = [i // each for i in range(count)]
        return {
            name: values[which].to(device) if torch.is_tensor(values) else [values[i] for i in which]
            for name, values in self._shown_batch.items()
        }

    def _sample(self, model: LatentDiffusion, cond: dict[str, Tensor] | None, count: int) -> Tensor:
        return sample(model, count, cond, settings=self._sampling, seed=self.seed)


def _start(run: Run, model: LatentDiffusion, first_stage: FirstStage) -> None:
    """Weights of another run, which must have been trained in the same latents."""
    if run.keys.init_from is None:
        return
    before = first_stage.fingerprint()
    run.start(model)
    if first_stage.fingerprint() != before:
        raise ValueError(
            f"init_from {run.keys.init_from} was trained in the latents of another first stage than "
            "first_stage; give the first stage of that run"
        )


def _absent_rows(run: Run) -> int:
    """1 where a network's table needs a row for the absent class; a DiT's has that row by itself."""
    found = run.target("network")
    return 0 if isinstance(found, type) and issubclass(found, DiT) else 1


class _Zeros(nn.Module):
    """In a network's place: zeros, `parts` times as many channels as it was given."""

    def __init__(self, parts: int):
        super().__init__()
        self.parts = parts

    def forward(self, z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return torch.zeros_like(z).repeat(1, self.parts, 1, 1)
