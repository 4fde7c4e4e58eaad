"""First stage: the autoencoder against its perceptual, adversarial and regularising losses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.diffusion.random import normal
from ldm.losses import AutoencoderLoss
from ldm.training.settings import TrainingSettings
from ldm.training.task import Task, mean_logs


class AutoencoderTask(Task):
    """Trains a first stage (and the loss's discriminator, with an optimizer of its own).

    Batches hold `image` (B, C, H, W) in [-1, 1], `position` (B,), and `label` (B,) for a conditional
    discriminator. As in the original, the adversary's adaptive weight and the discriminator's BatchNorm look
    at one part of the batch at a time: what one device sees of one accumulation step.
    """

    def __init__(self, model: nn.Module, loss: AutoencoderLoss, settings: TrainingSettings, seed: int = 0):
        super().__init__(settings, seed)
        self.model = self.averaged = model
        self.loss = loss
        self.train()
        adversarial = ("g_loss", "disc_loss") if loss.uses_discriminator else ()
        self.shown = ("rec_loss", "p_loss", "kl_loss", "quant_loss", *adversarial)

    def optimized(self) -> list[list[nn.Parameter]]:
        groups = [[*self.model.parameters(), *self.loss.autoencoder_parameters()]]
        if self.loss.uses_discriminator:
            groups.append(list(self.loss.discriminator_parameters()))
        return groups

    def update(self, batch: dict) -> dict[str, Tensor]:
        parts = self.parts(batch)
        logs, reconstructions = [], []
        for i, part in enumerate(parts):
            reconstruction, encoded = self.model(part["image"], noise=self.noise(part, "train"))
            loss, log = self.loss.generator_loss(
                part["image"], reconstruction, encoded, self.step, self.model.last_layer, self.condition(part)
            )
            self.backward_part(loss, i)
            logs.append(log)
            reconstructions.append(reconstruction.detach())
        result = {**mean_logs(logs), "grad_norm": self.optimizer_step(0)}
        if self.loss.discriminator_active(self.step):
            logs = []
            for i, (part, reconstruction) in enumerate(zip(parts, reconstructions, strict=True)):
                loss, log = self.loss.discriminator_loss(
                    part["image"], reconstruction, self.step, self.condition(part)
                )
                self.backward_part(loss, i)
                logs.append(log)
            self.optimizer_step(1)
            result |= mean_logs(logs)
        return result

    def condition(self, batch: dict) -> Tensor | None:
        """What a conditional discriminator is told: the class."""
        return batch["label"] if self.loss.disc_conditional else None

    def noise(self, batch: dict, stream: str) -> Tensor:
        """What the posterior is sampled with, addressed by the samples' positions."""
        return normal(self.seed, f"{stream}/posterior", batch["position"], self.latent_shape(batch))

    def latent_shape(self, batch: dict) -> tuple[int, ...]:
        """(C, h, w) of this batch's latents."""
        factor = self.model.downsampling_factor
        return (self.model.latent_channels, *(side // factor for side in batch["image"].shape[-2:]))

    def measure(self, batch: dict) -> dict[str, Tensor]:
        image = batch["image"]
        reconstruction, encoded = self.model(image, noise=self.noise(batch, "validation"))
        reconstruction = reconstruction.clamp(-1, 1).float()
        squared = ((reconstruction - image) ** 2).flatten(1).mean(1)
        measures = {
            "l1": (reconstruction - image).abs().flatten(1).mean(1),
            # A range of 2 between black and white: PSNR = 10 log10(4 / MSE).
            "psnr": 10 * torch.log10(4 / squared.clamp_min(1e-10)),
        }
        if hasattr(encoded, "kl"):
            measures["kl"] = encoded.kl()
        if self.loss.perceptual_loss is not None:
            measures["perceptual"] = self.loss.perceptual_loss(image, reconstruction).flatten()
        return measures

    def extra_state(self) -> dict[str, Tensor]:
        return self.loss.checkpoint_state()

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self.loss.load_checkpoint_state(state)
