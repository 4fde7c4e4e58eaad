"""What a training method is built from: its config, its data, and where weights may come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import Dataset

from ldm import config as configuration
from ldm.checkpoints import load
from ldm.checkpoints.strict import load_strict
from ldm.config.signatures import resolve_target
from ldm.data import collate
from ldm.training.run_config import RunConfig

#: What a data set must have besides items, to be trained on.
DATA_SET = ("split", "set_seed", "fingerprint", "classes", "size", "channels")


@dataclass
class Run:
    """One run, before its steps.

    Attributes:
        cfg: the whole config, in which `provide` replaces what the YAML leaves to the program.
        keys: its plain keys, an instance of the method's `Keys`.
        train, validation: data sets; the samples of `train` are asked for by (index, position).
        device: on which something may be computed before the first step.
        resuming: a checkpoint's weights are loaded next, so none are looked for elsewhere.
        rehearsal: for a trial or a plan of one step: nothing is cached, measured, or fetched.
        built: networks that are there already, by their key in the config.
    """

    cfg: DictConfig
    keys: RunConfig
    train: Dataset
    validation: Dataset | None
    device: torch.device
    resuming: bool = False
    rehearsal: bool = False
    built: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def shown(self) -> Dataset:
        """Images to draw pictures of: held-out ones where there are any."""
        return self.validation or self.train

    def provide(self, part: str, name: str, make: Callable[[], Any]) -> None:
        """Put `make()` where the config leaves a parameter to the program, see `ldm.config.fill`."""
        configuration.fill(self.cfg, part, name, make, allow_foreign=True)

    @property
    def holds_values(self) -> bool:
        """False for a plan, on the meta device."""
        return self.device.type != "meta"

    def target(self, part: str) -> Any:
        """The class that a part of the config names."""
        return resolve_target(self.cfg[part]["target"], allow_foreign=True)

    def count_classes(self) -> int:
        """Number of classes of the data.

        Raises:
            ValueError: the data has none.
        """
        if self.train.classes:
            return len(self.train.classes)
        raise ValueError("the data has no classes (an image folder has one a subfolder)")

    def instantiate(self, part: str, **given: Any) -> Any:
        """The object of a part of the config, None where the config has none."""
        node = self.cfg.get(part)
        return configuration.instantiate(node, allow_foreign=True, **given) if node else None

    def build(self, *parts: str) -> list[Any]:
        """The objects of parts of the config, in this order, their weights drawn by the run's seed."""
        torch.manual_seed(self.keys.seed)
        return [self.instantiate(part) for part in parts]

    def start(self, model: nn.Module) -> None:
        """Give a model the weights that `init_from` names, unless the run goes on with its own."""
        path = self.keys.init_from
        if path is not None and self.holds_values and not self.resuming:
            # What this run's config names may be in the other file too.
            load_strict(model, load(path, configuration.to_plain(self.cfg)).state_dict(), where=path)


def begin(
    cfg: DictConfig,
    keys: RunConfig,
    device: torch.device,
    resuming: bool = False,
    rehearsal: bool = False,
) -> Run:
    """The run of a checked config, with its data.

    Raises:
        ValueError: a data set that cannot be trained on.
    """
    whole = configuration.instantiate(cfg.data, allow_foreign=True)
    lacks = [name for name in DATA_SET if not hasattr(whole, name)]
    if lacks:
        raise ValueError(
            f"data.target {cfg.data.target} lacks {', '.join(lacks)}; as `source` of an ldm.data.Wrapped it "
            "needs a length and items only"
        )
    whole.set_seed(keys.seed)
    train, validation = whole.split("train"), whole.split("validation")
    if len(train) == 0:
        raise ValueError("data: no image is left to train on")
    return Run(cfg, keys, train, validation if len(validation) else None, device, resuming, rehearsal)


def spread(dataset: Dataset, count: int) -> dict:
    """A batch of the plain view of `count` images, spread over the set."""
    indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    whole = hasattr(dataset, "__getitems__")
    return collate(dataset.__getitems__(indices) if whole else [dataset[i] for i in indices])
