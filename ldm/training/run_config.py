"""The training config as a whole: which keys it has, and its check before anything slow starts."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig

from ldm import config as configuration
from ldm.config import signatures
from ldm.config.other_runs import from_run as from_run  # makes ${from_run:...} known
from ldm.sampling import Sampling
from ldm.training.settings import (
    AugmentSettings,
    LoggingSettings,
    OptimizerSettings,
    TrainingSettings,
)


@dataclass(kw_only=True)
class RunConfig:
    """Keys of every training config.

    task: which stage this is.
    name: the run's folder is `runs`/`name`.
    seed: what every random number of the run follows from.
    runs: where run folders (and cached latents) lie.
    data: the data set, target and params.
    """

    task: Literal["autoencoder", "diffusion", "classifier"]
    name: str
    seed: int = 0
    runs: str = "runs"
    data: dict
    training: TrainingSettings = field(default_factory=TrainingSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name or self.name in (".", ".."):
            raise ValueError(
                f"name must be a plain folder name, got {self.name!r}; `runs` says where the folder lies"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


@dataclass(kw_only=True)
class AutoencoderRun(RunConfig):
    """First stage: `model` is the autoencoder, `loss` its objective.

    init_from: weights to start from, a run folder or a file, with the same architecture.
    """

    model: dict
    loss: dict
    init_from: str | None = None


@dataclass(kw_only=True)
class DiffusionRun(RunConfig):
    """Second stage.

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


@dataclass(kw_only=True)
class ClassifierRun(RunConfig):
    """A classifier of images, for evaluation, guidance, or as an image encoder.

    model: images (B, C, H, W) to logits; its `num_classes: auto` is filled from the data.
    label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2015,
        https://arxiv.org/abs/1512.00567, section 7).
    augment: how far training images are moved at random.
    init_from: weights to start from, a run folder or a file, with the same architecture.
    """

    model: dict
    label_smoothing: float = 0.0
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    init_from: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share in [0, 1), got {self.label_smoothing}")


KINDS: dict[str, type[RunConfig]] = {
    "autoencoder": AutoencoderRun,
    "diffusion": DiffusionRun,
    "classifier": ClassifierRun,
}

#: Plain sections, for overrides of keys that a YAML leaves at their defaults.
SECTIONS: dict[str, type] = {
    "training": TrainingSettings,
    "training.optimizer": OptimizerSettings,
    "augment": AugmentSettings,
    "logging": LoggingSettings,
    "sampling": Sampling,
}


def _sections_of(kind: type[RunConfig]) -> dict[str, type]:
    """Those of `SECTIONS` that this kind of run has."""
    own = {f.name for f in fields(kind)}
    return {path: section for path, section in SECTIONS.items() if path.split(".")[0] in own}


def load_run(
    path: str | Path, overrides: Iterable[str] = (), assumed: Mapping[str, Any] | None = None
) -> tuple[DictConfig, RunConfig]:
    """A training config, merged with overrides and held against the code; nothing is built yet.

    `assumed` stands in the place of what is still open, see `ldm.config.load`.

    Raises:
        ConfigError: every mistake found, with its place.
    """
    kind = KINDS.get(_task(path))
    sections = SECTIONS if kind is None else {**_sections_of(kind), "": kind}
    cfg = configuration.load(path, list(overrides), sections=sections, assumed=assumed)
    task = cfg.get("task")
    if task not in KINDS:
        raise configuration.ConfigError(f"{path}: task: must be one of {', '.join(KINDS)}, got {task!r}")
    problems = []
    run = None
    try:
        run = configuration.check_section(cfg, KINDS[task])
    except configuration.ConfigError as error:
        problems += error.problems
    try:
        configuration.check(cfg, allow_foreign=True, provided={"objective": ["denoiser"]})
    except configuration.ConfigError as error:
        problems += error.problems
    if problems:
        raise configuration.ConfigError(*problems)
    return cfg, run


def complete(cfg: DictConfig, run: RunConfig) -> dict:
    """The config as plain data with the default of every plain section filled in."""
    plain = configuration.to_plain(cfg)
    for f in fields(run):
        value = getattr(run, f.name)
        plain[f.name] = asdict(value) if is_dataclass(value) else plain.get(f.name, value)
    return plain


def complete_yaml(cfg: DictConfig, run: RunConfig) -> str:
    """`complete` as YAML text."""
    return configuration.to_yaml(complete(cfg, run))


def _task(path: str | Path) -> str | None:
    """The task a file or one of its bases names, read leniently: `load` is about to say what is wrong."""
    import yaml

    path, seen = Path(path), set()
    while path.resolve() not in seen:
        seen.add(path.resolve())
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return None
        if not isinstance(tree, dict) or "task" in tree or not isinstance(tree.get("base"), str):
            return tree.get("task") if isinstance(tree, dict) else None
        path = path.parent / tree["base"]
    return None


def fill_classes(tree: Any, classes: list[str] | None, absent: int = 0) -> None:
    """Replace every `num_classes: auto`, and the discriminator's `disc_num_classes: auto`, in a config's tree
    by the number of classes of the data, in place.

    A `network` that embeds labels itself also counts the absent class, as `ClassLabel` does: `absent` rows
    more.

    Raises:
        ValueError: the data has no classes.
    """
    if isinstance(tree, dict | DictConfig):
        for name in ("num_classes", "disc_num_classes"):
            if name in tree and tree[name] == "auto":
                tree[name] = _count(name, classes) + absent
        for name, value in tree.items():
            fill_classes(value, classes, _absent_rows(value) if name == "network" else absent)
    elif isinstance(tree, list | ListConfig):
        for item in tree:
            fill_classes(item, classes, absent)


def _absent_rows(network: Any) -> int:
    """1 where a network's table needs a row for the absent class; a DiT's has that row by itself."""
    from ldm.models.dit import DiT

    if not isinstance(network, dict | DictConfig) or "target" not in network:
        return 0
    found = signatures.resolve_target(network["target"], allow_foreign=True)
    return 0 if isinstance(found, type) and issubclass(found, DiT) else 1


def _count(name: str, classes: list[str] | None) -> int:
    if classes:
        return len(classes)
    without = {
        "num_classes": "take configs/diffusion/uncond-unet-f8.yaml for a diffusion model without classes",
        "disc_num_classes": "for a discriminator without classes set loss.params.disc_conditional=false and "
        "loss.params.disc_num_classes=null",
    }
    raise ValueError(
        f"the model is conditioned on classes ({name}: auto), but the data has none. An image folder has "
        f"classes when its images lie in subfolders, one a class; {without[name]}"
    )
