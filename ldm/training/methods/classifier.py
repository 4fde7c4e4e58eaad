"""A classifier of images: cross entropy on the labels."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ldm.data import SequentialBatches, make_loader
from ldm.data.images.grid import image_grid
from ldm.training.augmentation import AugmentSettings, moved
from ldm.training.method import Figures, Method
from ldm.training.networks import channels_last
from ldm.training.run import Run
from ldm.training.run_config import RunConfig

_TOP = 5
_MOST_MEASURED = 2000  # images among which the mistakes are looked for


@dataclass(kw_only=True)
class ClassifierKeys(RunConfig):
    """A classifier, for evaluation, guidance, or as an image encoder.

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


class ClassifierMethod(Method):
    """Trains `model`, images (B, C, H, W) to logits (B, classes).

    Batches hold `image` (B, C, H, W) in [-1, 1] and `label` (B,).
    """

    Keys = ClassifierKeys
    offers = {"model": ["num_classes"]}
    shown = ("loss", "accuracy")
    picture = "mistakes"

    def __init__(self, run: Run, model: nn.Module):
        super().__init__(run, model)
        self._shown_set = run.shown

    @classmethod
    def build(cls, run: Run) -> "ClassifierMethod":
        if not run.train.classes:
            raise ValueError(
                "a classifier needs labels, but the data has no classes (one subfolder a class makes them)"
            )
        run.provide("model", "num_classes", run.count_classes)
        (model,) = run.build("model")
        model = channels_last(model).train()
        _check_model(model, run.train)
        run.start(model)
        return cls(run, model)

    def parts(self) -> dict[str, nn.Module]:
        return {"classifier": self.model}

    def loss(self, batch: dict) -> tuple[Tensor, Figures]:
        images = moved(batch["image"], batch["position"], self.keys.augment, self.seed)
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.keys.label_smoothing)
        return loss, {"loss": loss, "accuracy": _hits(logits, batch["label"])}

    def validate(self, batch: dict) -> Figures:
        """Cross entropy without smoothing, and the share of images whose class is named (among the first five
        where there are more classes than ten)."""
        logits, labels = self.model(batch["image"]).float(), batch["label"]
        figures = {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": _hits(logits, labels),
        }
        if logits.shape[1] > 2 * _TOP:
            figures[f"top{_TOP}"] = (logits.topk(_TOP, dim=1).indices == labels[:, None]).any(1).float()
        return figures

    def draw(self) -> Image:
        """The held-out images with the highest loss, the worst first."""
        dataset = self._shown_set
        count = min(self.keys.logging.images, len(dataset))
        indices = np.linspace(0, len(dataset) - 1, min(_MOST_MEASURED, len(dataset))).astype(int)
        worst, losses = torch.empty(0), torch.empty(0)
        for batch in make_loader(dataset, SequentialBatches(indices, 64), 0):
            given = {name: batch[name].to(self.device) for name in ("image", "label")}
            every = torch.cat([losses, self.validate(given)["loss"].float().cpu()])
            images = torch.cat([worst, batch["image"]]) if len(worst) else batch["image"]
            order = every.argsort(descending=True)[:count]
            worst, losses = images[order], every[order]
        return image_grid(worst, columns=max(1, round(count**0.5)))


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float()


def _check_model(model: nn.Module, train: Dataset) -> None:
    """One image through the model: what does not fit is told before anything is trained."""
    training = model.training
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, train.channels, train.size, train.size, device=device))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the model does not take the data's {train.channels}x{train.size}x{train.size} images: {error}"
        ) from error
    finally:
        model.train(training)
    expected = (1, len(train.classes))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model gives {found} for one image, expected logits {expected}, one a class of the data; "
            "set its num_classes to auto"
        )
