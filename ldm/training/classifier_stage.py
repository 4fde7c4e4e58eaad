"""From the config of a classifier to what its run needs."""

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from torch.utils.data import Dataset

from ldm import config as configuration
from ldm.checkpoints import native
from ldm.data import SequentialBatches, make_loader
from ldm.data.images.grid import image_grid
from ldm.training.classifier import ClassifierTask
from ldm.training.networks import channels_last
from ldm.training.run_config import ClassifierRun, fill_classes
from ldm.training.stage import Stage, build_data, identity_of, start_from

_MOST_MEASURED = 2000  # images among which the mistakes are looked for


def classifier_stage(run: ClassifierRun, cfg, resuming: bool) -> Stage:
    train, validation = build_data(run, cfg)
    if not train.classes:
        raise ValueError(
            "a classifier needs labels, but the data has no classes (one subfolder a class makes them)"
        )
    fill_classes(cfg, train.classes)
    torch.manual_seed(run.seed)
    model = channels_last(configuration.instantiate(cfg.model, allow_foreign=True)).train()
    _check_model(model, train)
    if run.init_from is not None and not resuming:
        start_from(model, run.init_from, cfg)
    description = {
        "format": native.FORMAT,
        "model": configuration.to_plain(cfg.model),
        "image_size": [train.size, train.size],
        "classes": train.classes,
        "sampling": None,
    }
    task = ClassifierTask(model, run.training, run.label_smoothing, run.augment, run.seed)
    draw = Mistakes(validation or train, run.logging.images)
    return Stage(train, validation, task, description, identity_of(train), draw)


def _check_model(model: nn.Module, train: Dataset) -> None:
    """One image through the model: what does not fit is told before anything is trained."""
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, train.channels, train.size, train.size))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the model does not take the data's {train.channels}x{train.size}x{train.size} images: {error}"
        ) from error
    finally:
        model.train(training)
    expected = (1, len(train.classes))
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"the model gives {found} for one image, expected logits {expected}, one a class of the data; "
            "set its num_classes to auto"
        )


class Mistakes:
    """The held-out images with the highest loss, the worst first."""

    name = "mistakes"

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count = dataset, min(count, len(dataset))

    def __call__(self, task: ClassifierTask) -> Image:
        indices = np.linspace(0, len(self.dataset) - 1, min(_MOST_MEASURED, len(self.dataset))).astype(int)
        worst, losses = torch.empty(0), torch.empty(0)
        for batch in make_loader(self.dataset, SequentialBatches(indices, 64), 0):
            given = {name: batch[name].to(task.device) for name in ("image", "label")}
            every = torch.cat([losses, task.measure(given)["loss"].float().cpu()])
            images = torch.cat([worst, batch["image"]]) if len(worst) else batch["image"]
            order = every.argsort(descending=True)[: self.count]
            worst, losses = images[order], every[order]
        return image_grid(worst, columns=max(1, round(self.count**0.5)))
