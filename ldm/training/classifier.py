"""A classifier of images: cross entropy on the labels."""

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.training.augmentation import moved
from ldm.training.settings import AugmentSettings, TrainingSettings
from ldm.training.task import Task, mean_logs

_TOP = 5


class ClassifierTask(Task):
    """Trains `model`, images (B, C, H, W) to logits (B, classes).

    Batches hold `image` (B, C, H, W) in [-1, 1], `label` (B,) and `position` (B,).
    """

    shown = ("loss", "accuracy")

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        label_smoothing: float = 0.0,
        augment: AugmentSettings | None = None,
        seed: int = 0,
    ):
        super().__init__(settings, seed)
        self.model = self.averaged = model
        self.label_smoothing = label_smoothing
        self.augment = AugmentSettings() if augment is None else augment

    def optimized(self) -> list[list[nn.Parameter]]:
        return [[p for p in self.model.parameters() if p.requires_grad]]

    def update(self, batch: dict) -> dict[str, Tensor]:
        logs = []
        for i, part in enumerate(self.parts(batch)):
            images = moved(part["image"], part["position"], self.augment, self.seed)
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, part["label"], label_smoothing=self.label_smoothing)
            self.backward_part(loss, i)
            logs.append({"loss": loss, "accuracy": _hits(logits, part["label"])})
        return {**mean_logs(logs), "grad_norm": self.optimizer_step(0)}

    def measure(self, batch: dict) -> dict[str, Tensor]:
        """Cross entropy without smoothing, and the share of images whose class is named (among the first five
        where there are more classes than ten)."""
        logits, labels = self.model(batch["image"]).float(), batch["label"]
        measures = {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": _hits(logits, labels),
        }
        if logits.shape[1] > 2 * _TOP:
            measures[f"top{_TOP}"] = (logits.topk(_TOP, dim=1).indices == labels[:, None]).any(1).float()
        return measures


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float()
