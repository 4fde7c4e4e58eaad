"""First stage: the autoencoder against its perceptual, adversarial and regularising losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.images.grid import image_grid
from ldm.diffusion.random import normal
from ldm.losses import AutoencoderLoss
from ldm.training.method import Figures, Method
from ldm.training.networks import channels_last
from ldm.training.run import Run, spread
from ldm.training.run_config import RunConfig


@dataclass(kw_only=True)
class AutoencoderKeys(RunConfig):
    """`model` is the autoencoder, `loss` its objective.

    init_from: weights to start from, a run folder or a file, with the same architecture.
    """

    model: dict
    loss: dict
    init_from: str | None = None


class AutoencoderMethod(Method):
    """Trains a first stage, and the objective's discriminator with an optimizer of its own.

    Batches hold `image` (B, C, H, W) in [-1, 1], and `label` (B,) for a conditional discriminator. As in the
    original, the adversary's adaptive weight and the discriminator's BatchNorm look at one part of the batch
    at a time: what one device sees of one accumulation step.
    """

    Keys = AutoencoderKeys
    offers = {"model": ["num_classes"], "loss": ["disc_num_classes"]}
    picture = "reconstruction"
    rests = True  # the discriminator before its start, and the autoencoder while it learns

    def __init__(self, run: Run, model: nn.Module, objective: AutoencoderLoss):
        super().__init__(run, model)
        self.objective = objective
        self.train()
        adversarial = ("g_loss", "disc_loss") if objective.uses_discriminator else ()
        self.shown = ("rec_loss", "p_loss", "kl_loss", "quant_loss", *adversarial)
        count = min(self.keys.logging.images, len(run.shown))
        self._shown_set, self._shown_count, self._shown_batch = run.shown, count, None

    @classmethod
    def build(cls, run: Run) -> "AutoencoderMethod":
        run.provide("model", "num_classes", run.count_classes)
        run.provide("loss", "disc_num_classes", run.count_classes)
        if run.rehearsal:
            _without_published_weights(run)
        model, objective = map(channels_last, run.build("model", "loss"))
        check_images(model, run.train)
        _check_discriminator(objective, run.train)
        run.start(model)
        if run.rehearsal:
            objective.disc_start = 0  # the memory is that of the whole run, not of its beginning
        return cls(run, model, objective)

    def losses(self) -> list[Callable]:
        active = self.objective.discriminator_active(self.step)
        return [self.loss, self.discriminator_loss] if active else [self.loss]

    def trained(self) -> list[list[nn.Parameter]]:
        groups = [[*self.model.parameters(), *self.objective.autoencoder_parameters()]]
        if self.objective.uses_discriminator:
            groups.append(self.objective.discriminator_parameters())
        return groups

    def parts(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.model, **dict(self.objective.named_children())}

    def loss(self, batch: dict) -> tuple[Tensor, Figures]:
        reconstruction, encoded = self.model(batch["image"], noise=self.noise(batch, "train"))
        batch["reconstruction"] = reconstruction.detach()  # for the discriminator, in the same step
        return self.objective.generator_loss(
            batch["image"], reconstruction, encoded, self.step, self.model.last_layer, self.condition(batch)
        )

    def discriminator_loss(self, batch: dict) -> tuple[Tensor, Figures]:
        return self.objective.discriminator_loss(
            batch["image"], batch["reconstruction"], self.step, self.condition(batch)
        )

    def condition(self, batch: dict) -> Tensor | None:
        """What a conditional discriminator is told: the class."""
        return batch["label"] if self.objective.disc_conditional else None

    def noise(self, batch: dict, stream: str) -> Tensor:
        """What the posterior is sampled with, addressed by the samples' positions."""
        factor = self.model.downsampling_factor
        shape = (self.model.latent_channels, *(side // factor for side in batch["image"].shape[-2:]))
        return normal(self.seed, f"{stream}/posterior", batch["position"], shape)

    def validate(self, batch: dict) -> Figures:
        image = batch["image"]
        reconstruction, encoded = self.model(image, noise=self.noise(batch, "validation"))
        reconstruction = reconstruction.clamp(-1, 1).float()
        squared = ((reconstruction - image) ** 2).flatten(1).mean(1)
        figures = {
            "l1": (reconstruction - image).abs().flatten(1).mean(1),
            # A range of 2 between black and white: PSNR = 10 log10(4 / MSE).
            "psnr": 10 * torch.log10(4 / squared.clamp_min(1e-10)),
        }
        if hasattr(encoded, "kl"):
            figures["kl"] = encoded.kl()
        if self.objective.perceptual_loss is not None:
            figures["perceptual"] = self.objective.perceptual_loss(image, reconstruction).flatten()
        return figures

    def draw(self) -> Image:
        """Originals above, their reconstructions below: the same few images, spread over the set."""
        if self._shown_batch is None:
            self._shown_batch = spread(self._shown_set, self._shown_count)
        images = self._shown_batch["image"].to(self.device)
        addressed = {"image": images, "position": self._shown_batch["index"].to(self.device)}
        reconstruction, _ = self.model(images, noise=self.noise(addressed, "validation"))
        return image_grid(torch.cat([images, reconstruction.float()]), columns=self._shown_count)

    def extra_state(self) -> dict[str, Tensor]:
        return self.objective.checkpoint_state()

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self.objective.load_checkpoint_state(state)


#: The perceptual networks by the names that the loss knows them by.
_PERCEPTUAL = {
    "lpips": "ldm.losses.lpips.LPIPS",
    "efficientnet": "ldm.losses.efficientnet.EfficientNetPerceptual",
}


def _without_published_weights(run: Run) -> None:
    """Sizes are all that a trial or a plan wants of a perceptual network."""
    params = run.cfg.loss.get("params")
    if params is not None and run.target("loss") is AutoencoderLoss:
        choice = params.get("perceptual", "lpips")
        if choice in _PERCEPTUAL:
            params.perceptual = {"target": _PERCEPTUAL[choice], "params": {"pretrained": False}}


def check_images(model: nn.Module, train: Dataset) -> None:
    """ValueError where a first stage does not take the data's images."""
    factor, size = model.downsampling_factor, train.size
    if size % factor:
        raise ValueError(
            f"data.params.size {size} is not a multiple of the autoencoder's downsampling factor {factor}"
        )
    if train.channels != model.image_channels:
        raise ValueError(
            f"the images have {train.channels} channels, the autoencoder takes {model.image_channels}; set "
            f"data.params.channels={model.image_channels}, or the autoencoder's in_channels and out_ch"
        )


def _check_discriminator(objective: AutoencoderLoss, train: Dataset) -> None:
    """What would otherwise come up when the discriminator wakes, which may be hours into a run."""
    if not objective.uses_discriminator:
        return
    network, classes = objective.discriminator, len(train.classes or [])
    if network.input_nc != train.channels:
        raise ValueError(
            f"loss.params.disc_in_channels is {network.input_nc}, the images have {train.channels} channels"
        )
    if train.size < network.smallest:
        raise ValueError(
            f"data.params.size {train.size} is too small for the discriminator, which takes "
            f"{network.smallest} and more; lower loss.params.disc_num_layers, or set "
            "loss.params.disc_weight=0 for none"
        )
    if objective.disc_conditional and objective.disc_num_classes != classes:
        raise ValueError(
            f"loss.params.disc_num_classes is {objective.disc_num_classes}, the data has {classes} classes"
        )
