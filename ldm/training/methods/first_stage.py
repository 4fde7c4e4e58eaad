"""What the diffusion model needs of other runs: the first stage's weights and latents, encoders' weights."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoints import load, native
from ldm.checkpoints.description import described
from ldm.checkpoints.trust import is_run_config
from ldm.conditioning import Conditioner
from ldm.data import LatentCache, measure_latents
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage
from ldm.training.loop.progress import image_progress
from ldm.training.run import Run
from ldm.weights.reading import read_weights

log = logging.getLogger(__name__)

FILE = "first_stage.safetensors"
_MEASURED_IMAGES = 10_000


class FirstStage:
    """The frozen autoencoder of a diffusion run.

    Attributes:
        model: in eval mode, without gradients.
        source: where it was read from; None for a model of pixels.
    """

    def __init__(self, model: nn.Module, source: Path | None = None):
        self.model, self.source = model.eval().requires_grad_(False), source

    @classmethod
    def of(cls, run: Run) -> "FirstStage":
        """That of a run's config.

        A run keeps a copy and goes on with that: moving or retraining the first stage later does not change a
        diffusion run behind its back.

        Raises:
            ValueError: there is none, or it is no first stage.
        """
        if "first_stage" in run.built:
            return cls(run.built["first_stage"])
        source = _find(run)
        if source is None:
            return cls(IdentityFirstStage(run.train.channels))
        config = run.keys.first_stage_config
        if config is not None and source.name == FILE and not is_run_config(config):
            config = None  # the run's own copy of a published one, which describes itself
        model = load(source, config)
        log.info("first stage: %s, step %s", source, model.description.step or "unknown")
        model = model.first_stage_model if isinstance(model, LatentDiffusion) else model
        if not hasattr(model, "moments"):
            raise ValueError(f"first_stage {source} holds a {type(model).__name__}, which is no first stage")
        return cls(model, source)

    def fingerprint(self) -> str:
        return native.fingerprint(self.model.state_dict())

    def keep(self, folder: Path) -> None:
        """Write the run's own copy, unless it is this one."""
        if self.source not in (None, folder / FILE):
            native.save_model(folder / FILE, self.model.state_dict(), described(self.model))

    def prepare(self, run: Run, model: LatentDiffusion) -> list[Dataset | None]:
        """The run's data, as latents where the config asks for that; sets the shift and scale of `model`."""
        parts = [run.train, run.validation]
        if run.rehearsal:
            return [part and Encoded(part, self.model) for part in parts] if run.keys.cached else parts
        measured = None
        if run.keys.cached:
            names = ("train", "validation")
            beside = [key for e in model.conditioner.embedders for key in (e.key, *e.also)]
            caches = [
                part and self._cache(run, part, name, beside) for part, name in zip(parts, names, strict=True)
            ]
            measured = caches[0].latent_mean, caches[0].latent_std
            parts = [cache and cache.dataset() for cache in caches]
            for part in filter(None, parts):
                part.set_seed(run.keys.seed)
        if run.keys.latent_scale != "auto":
            model.latent_scale.fill_(run.keys.latent_scale)
        elif not run.resuming and run.keys.init_from is None:  # else they come with the weights
            _normalise(model, *(measured or self._measure(run)))
        self.model.cpu()
        return parts

    @torch.no_grad()
    def _moments(self, device: torch.device, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) -> mean and std of their latents (B, c, h, w), on the CPU."""
        mean, std = self.model.to(device).moments(images.to(device))
        return mean.float().cpu(), std.float().cpu()

    def _cache(self, run: Run, dataset: Dataset, name: str, beside: list[str]) -> LatentCache:
        """The latents of a data set from disk, encoded now unless they are there."""
        keys, encoder = run.keys, self.fingerprint()
        flips = "-flips" if getattr(dataset, "flip", False) else ""
        beside = sorted({*beside} & {*dataset[0]} - {"label", "caption"})
        key = "-".join([dataset.fingerprint()[:12], encoder[:12], f"{keys.cache_dtype}{flips}", *beside])
        with image_progress(f"encoding the {name} images", keys.logging.progress) as progress:
            return LatentCache.build(
                dataset,
                lambda images: self._moments(run.device, images),
                Path(keys.runs) / "latents" / key,
                first_stage=encoder,
                beside=beside,
                dtype=keys.cache_dtype,
                batch_size=_batch_size(run, dataset),
                num_workers=keys.training.workers,
                progress=progress,
            )

    def _measure(self, run: Run) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, (c,) each, without a cache."""
        with image_progress("measuring the latents", run.keys.logging.progress) as progress:
            statistics = measure_latents(
                run.train,
                lambda images: self._moments(run.device, images),
                _MEASURED_IMAGES,
                _batch_size(run, run.train),
                run.keys.training.workers,
                progress,
            )
        return statistics.mean.float(), statistics.std.float()


class Encoded(Dataset):
    """Samples as a latent cache gives them, encoded one by one: for a rehearsal, which caches nothing."""

    def __init__(self, dataset: Dataset, first_stage: nn.Module):
        self.dataset, self.first_stage = dataset, first_stage

    def __len__(self) -> int:
        return len(self.dataset)

    @torch.no_grad()
    def __getitem__(self, entry) -> dict:
        sample = dict(self.dataset[entry])
        device = next((p.device for p in self.first_stage.parameters()), sample["image"].device)
        mean, std = self.first_stage.moments(sample.pop("image")[None].to(device))
        return {"mean": mean[0], "std": std[0], **sample}


def _find(run: Run) -> Path | None:
    if run.keys.first_stage is None:
        return None
    copy, given = run.keys.folder / FILE, Path(run.keys.first_stage)
    if run.resuming and copy.exists():
        return copy
    if not given.exists():
        beside = sorted(path.name for path in given.parent.glob("*") if native.is_run_folder(path))
        there = f"; {given.parent} has {', '.join(beside)}" if beside else ""
        raise ValueError(
            f"first_stage {given} does not exist; give the run folder of a trained autoencoder{there}"
        )
    return given


def _batch_size(run: Run, dataset: Dataset) -> int:
    return 64 if dataset.size <= 64 else 8 if run.device.type == "cpu" else 32


def _normalise(model: LatentDiffusion, mean: Tensor, std: Tensor) -> None:
    if not (std > 0).all():
        raise ValueError(f"a channel of the latents does not vary (standard deviations {std.tolist()})")
    model.latent_shift.copy_(mean.reshape(-1, 1, 1))
    model.latent_scale.copy_(1 / std.reshape(-1, 1, 1))


def load_encoders(conditioner: Conditioner) -> None:
    """Give every embedder with a `weights` path (an `ImageEmbedder`'s) the weights that lie there.

    Raises:
        ValueError: nothing is there, it does not fit, or an encoder that is not trained has none.
    """
    for embedder in conditioner.embedders:
        name, source = type(embedder).__name__, getattr(embedder, "weights", None)
        if source is None and not getattr(embedder, "trainable", True):
            raise ValueError(
                f"conditioner: the encoder of the {name} is not trained and has no `weights`: give them (the "
                "run folder of a classifier, or a file), or train it too with trainable: true"
            )
        if source is None:
            continue
        path = Path(source)
        if not path.exists():
            raise ValueError(
                f"conditioner: weights {path} of the {name} do not exist; give a run folder or a file"
            )
        tensors = load(path).state_dict() if native.is_run_folder(path) else read_weights(path).tensors
        try:
            embedder.take_weights(tensors)
        except ValueError as error:
            raise ValueError(f"conditioner: weights {path}: {error}") from error
        log.info("%s: weights of %s", name, path)
