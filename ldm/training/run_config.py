"""The training config as a whole: which keys it has, and its check before anything slow starts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from ldm import config as configuration
from ldm.config.other_runs import from_run as from_run  # makes ${from_run:...} known
from ldm.sampling.section import Sampling
from ldm.training.methods import find_method
from ldm.training.settings import LoggingSettings, OptimizerSettings, TrainingSettings


@dataclass(kw_only=True)
class RunConfig:
    """Keys of every training config; a method adds its own.

    task: the training method, a name in `ldm.training.methods.METHODS` or the dotted path of a class.
    name: the run's folder is `runs`/`name`.
    seed: what every random number of the run follows from.
    runs: where run folders (and cached latents) lie.
    data: the data set, target and params.
    callbacks, loggers: of Lightning or of one's own, target and params each; the trainer gets them.
    """

    task: str
    name: str
    seed: int = 0
    runs: str = "runs"
    data: dict
    training: TrainingSettings = field(default_factory=TrainingSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    callbacks: list[dict] = field(default_factory=list)
    loggers: list[dict] = field(default_factory=list)

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


#: Sections of every run. A mistyped override of theirs is told before any method (and torch) is imported.
PLAIN = {
    "training": TrainingSettings,
    "training.optimizer": OptimizerSettings,
    "logging": LoggingSettings,
    "sampling": Sampling,
}


class _Sections(Mapping):
    """Dataclasses of the plain sections by path, "" the whole; this one alone needs the method."""

    def __init__(self, task: str | None):
        self.task = task

    def __getitem__(self, path: str) -> type:
        if path in PLAIN:
            return PLAIN[path]
        if path:
            raise KeyError(path)
        try:
            return find_method(self.task).Keys
        except ValueError:  # told when the file is read
            return RunConfig

    def __iter__(self) -> Iterator[str]:
        """Those that every run has."""
        return (path for path in PLAIN if path != "sampling")

    def __len__(self) -> int:
        return len(list(iter(self)))


def load_run(
    path: str | Path,
    overrides: Iterable[str] = (),
    assumed: Mapping[str, Any] | None = None,
    look_first: Callable[[DictConfig], None] = lambda cfg: None,
) -> tuple[DictConfig, RunConfig]:
    """A training config, merged with overrides and held against the code; nothing is built yet.

    `assumed` stands in the place of what is still open, see `ldm.config.load`. `look_first` gets the config
    before the code that it names is imported, which takes seconds.

    Raises:
        ConfigError: every mistake found, with its place.
    """
    overrides = list(overrides)
    task = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("task=")), _task(path))
    cfg = configuration.load(path, overrides, sections=_Sections(task), assumed=assumed)
    look_first(cfg)
    try:
        method = find_method(cfg.get("task"))
    except ValueError as error:
        raise configuration.ConfigError(f"{path}: task: {error}") from error
    problems, keys = [], None
    try:
        keys = configuration.check_section(cfg, method.Keys)
    except configuration.ConfigError as error:
        problems += error.problems
    try:
        configuration.check(cfg, allow_foreign=True, provided=method.supplies, offered=method.offers)
    except configuration.ConfigError as error:
        problems += error.problems
    if problems:
        raise configuration.ConfigError(*problems)
    return cfg, keys


def complete(cfg: DictConfig, keys: RunConfig) -> dict:
    """The config as plain data with the default of every plain section filled in."""
    plain = configuration.to_plain(cfg)
    for f in fields(keys):
        value = getattr(keys, f.name)
        plain[f.name] = asdict(value) if is_dataclass(value) else plain.get(f.name, value)
    return plain


def complete_yaml(cfg: DictConfig, keys: RunConfig) -> str:
    """`complete` as YAML text."""
    return configuration.to_yaml(complete(cfg, keys))


def _task(path: str | Path) -> str | None:
    """The task a file or one of its bases names, read leniently: `load` is about to say what is wrong."""
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
