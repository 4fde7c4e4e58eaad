"""What the diffusion model needs of the first stage: its weights, kept with the run, and cached latents."""

import logging
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from ldm.checkpoints import load, native
from ldm.checkpoints.trust import is_run_config
from ldm.data import LatentCache, measure_latents
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage
from ldm.training.progress import image_progress
from ldm.training.run_config import DiffusionRun

log = logging.getLogger(__name__)

LATENT_STATISTICS_IMAGES = 10_000
FILE = "first_stage.safetensors"


def find_first_stage(run: DiffusionRun, resuming: bool) -> Path | None:
    """Where the first stage is read from; None diffuses pixels.

    A run keeps a copy and goes on with that: moving or retraining the first stage later does not change a
    diffusion run behind its back.
    """
    if run.first_stage is None:
        return None
    copy, given = run.folder / FILE, Path(run.first_stage)
    if resuming and copy.exists():
        return copy
    if not given.exists():
        beside = sorted(path.name for path in given.parent.glob("*") if native.is_run_folder(path))
        there = f"; {given.parent} has {', '.join(beside)}" if beside else ""
        raise ValueError(
            f"first_stage {given} does not exist; give the run folder of a trained autoencoder{there}"
        )
    return given


def load_first_stage(source: Path | None, channels: int, config: str | None = None) -> tuple[nn.Module, dict]:
    """The frozen autoencoder and its part {target, params} of the description; `config` as for `ldm.load`."""
    if source is None:
        part = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {"channels": channels}}
        return IdentityFirstStage(channels).eval(), part
    if config is not None and source.name == FILE and not is_run_config(config):
        config = None  # the run's own copy of a published one, which describes itself
    model = load(source, config)
    description = getattr(model, "description", {})
    part = description.get("model")
    log.info("first stage: %s, step %s", source, description.get("step") or "unknown")
    if isinstance(model, LatentDiffusion):
        model, part = model.first_stage_model, part["params"]["first_stage"]
    if not hasattr(model, "moments") or part is None:
        raise ValueError(f"first_stage {source} holds a {type(model).__name__}, which is no first stage")
    return model.requires_grad_(False), part


def keep_first_stage(folder: Path, model: nn.Module, part: dict, step: int | None = None) -> None:
    """Write the run's own copy."""
    description = {"format": native.FORMAT, "model": part, "weights": "ema", "step": step}
    native.save_model(folder / FILE, model.state_dict(), description)


class Latents:
    """Encodes with the first stage on a device, to which it goes when it is first needed."""

    def __init__(self, run: DiffusionRun, first_stage: nn.Module, device: torch.device):
        self.run, self.first_stage, self.device = run, first_stage, device
        self.fingerprint = native.fingerprint(first_stage.state_dict())

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) -> mean and std of their latents (B, c, h, w), on the CPU."""
        mean, std = self.first_stage.to(self.device).moments(images.to(self.device))
        return mean.float().cpu(), std.float().cpu()

    def batch_size(self, dataset: Dataset) -> int:
        return 64 if dataset.size <= 64 else 8 if self.device.type == "cpu" else 32

    def cache(self, dataset: Dataset, name: str) -> LatentCache:
        """The latents of a data set from disk, encoded now unless they are there."""
        run = self.run
        flips = "-flips" if getattr(dataset, "flip", False) else ""
        key = f"{dataset.fingerprint()[:12]}-{self.fingerprint[:12]}-{run.cache_dtype}{flips}"
        with image_progress(f"encoding the {name} images", run.logging.progress) as progress:
            return LatentCache.build(
                dataset,
                self.moments,
                Path(run.runs) / "latents" / key,
                first_stage=self.fingerprint,
                dtype=run.cache_dtype,
                batch_size=self.batch_size(dataset),
                num_workers=run.training.workers,
                progress=progress,
            )

    def measure(self, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each latent channel, (c,) each, without a cache."""
        with image_progress("measuring the latents", self.run.logging.progress) as progress:
            statistics = measure_latents(
                dataset,
                self.moments,
                LATENT_STATISTICS_IMAGES,
                self.batch_size(dataset),
                self.run.training.workers,
                progress,
            )
        return statistics.mean.float(), statistics.std.float()


def cached_and_normalised(
    run: DiffusionRun, model: LatentDiffusion, parts: list[Dataset | None], device: torch.device, known: bool
) -> list[Dataset | None]:
    """The parts of the data, as cached latents where the config asks for that; sets the latents' scale.

    known: the shift and scale come from elsewhere (a checkpoint, `init_from`), so `auto` measures nothing.
    """
    latents = Latents(run, model.first_stage_model, device)
    names = ("train", "validation")
    measured = None
    if run.cached:
        caches = [part and latents.cache(part, name) for part, name in zip(parts, names, strict=True)]
        parts = [cache and cache.dataset() for cache in caches]
        measured = caches[0].latent_mean, caches[0].latent_std
        for part in filter(None, parts):
            part.set_seed(run.seed)
    if run.latent_scale != "auto":
        model.latent_scale.fill_(run.latent_scale)
    elif not known:
        _normalise(model, *(measured or latents.measure(parts[0])))
    model.first_stage_model.cpu()
    return parts


def _normalise(model: LatentDiffusion, mean: torch.Tensor, std: torch.Tensor) -> None:
    if not (std > 0).all():
        raise ValueError(f"a channel of the latents does not vary (standard deviations {std.tolist()})")
    model.latent_shift.copy_(mean.reshape(-1, 1, 1))
    model.latent_scale.copy_(1 / std.reshape(-1, 1, 1))
