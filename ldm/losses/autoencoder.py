"""The objective of a perceptual autoencoder: reconstruction, perception, regularisation, and an adversary.

Rombach et al. 2021 (arXiv:2112.10752), appendix G, and the losses of its code (`LPIPSWithDiscriminator`,
`VQLPIPSWithDiscriminator`), in one class for both kinds of latent.
"""

import os
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.losses.adversarial import GAN_LOSSES, adaptive_weight, parameters_held
from ldm.losses.efficientnet import EfficientNetPerceptual
from ldm.losses.lpips import LPIPS
from ldm.models.autoencoder import DiagonalGaussian
from ldm.models.discriminator import NLayerDiscriminator
from ldm.models.quantize import VQOutput
from ldm.nn.precision import autocast_off
from ldm.wording import check_choice

#: State dict names under this prefix are of a frozen, published network and need not be saved.
FROZEN_PREFIX = "perceptual_loss."


class AutoencoderLoss(nn.Module):
    """Losses of the autoencoder and of its discriminator, for a KL or a VQ latent.

    The autoencoder minimises nll + regulariser + disc_factor * d_weight * g_loss, where
        nll = (pixel_weight * |x - r| or (x - r)^2, plus perceptual_weight * d(x, r)) / exp(logvar) + logvar,
        regulariser = kl_weight * KL, or codebook_weight * codebook loss,
        d_weight = disc_weight * adaptive_weight(nll, g_loss, last layer).
    Sums as in the original code: for KL, nll and KL are summed over a sample and averaged over the batch
    ("batch"); for VQ, nll is averaged over all elements ("element"). `normalize` chooses the other: "element"
    divides a KL objective by the elements of an image, "batch" multiplies a VQ objective by them; the optimum
    stays the same, only the size of the gradients changes (gradient clipping sees it, and the adaptive
    weight's 1e-4).

    `disc_start` counts optimizer steps of the autoencoder, not batches: before it, the discriminator is
    neither called nor trained. With `disc_factor` or `disc_weight` 0 none is built (`uses_discriminator`).
    `perceptual`: "lpips" (weights are fetched on first use; `vgg_path`, `lpips_path` are local copies),
    "efficientnet" (offline), None, or a module of (x, r) -> (B, 1, 1, 1). `disc_conditional`: a condition
    comes with every call, image-like (B, C, H, W) and counted in `disc_in_channels`, or with
    `disc_num_classes` labels (B,), which `auto` in a training config counts in the data. `logvar` is one
    number, trained only with `learn_logvar`, and used for KL alone, as in the original. Everything is reduced
    in float32, under autocast too.
    """

    def __init__(
        self,
        disc_start: int = 50001,
        pixel: str = "l1",
        pixel_weight: float = 1.0,
        perceptual: str | nn.Module | None = "lpips",
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        codebook_weight: float = 1.0,
        disc_weight: float = 0.5,
        disc_factor: float = 1.0,
        disc_loss: str = "hinge",
        disc_num_layers: int = 3,
        disc_ndf: int = 64,
        disc_in_channels: int = 3,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_num_classes: int | Literal["auto"] | None = None,
        logvar_init: float = 0.0,
        learn_logvar: bool = False,
        normalize: str | None = None,
        vgg_path: str | os.PathLike | None = None,
        lpips_path: str | os.PathLike | None = None,
    ):
        super().__init__()
        check_choice("pixel", pixel, ("l1", "l2"))
        check_choice("disc_loss", disc_loss, GAN_LOSSES)
        check_choice("normalize", normalize, (None, "batch", "element"))
        if disc_num_classes is not None and not disc_conditional:
            raise ValueError("disc_num_classes needs disc_conditional: true")
        if disc_num_classes == "auto":
            raise ValueError("disc_num_classes: auto is for training configs, where the data fills it in")
        self.pixel, self.pixel_weight, self.perceptual_weight = pixel, pixel_weight, perceptual_weight
        self.kl_weight, self.codebook_weight, self.normalize = kl_weight, codebook_weight, normalize
        self.disc_start, self.disc_weight, self.disc_factor = disc_start, disc_weight, disc_factor
        self.disc_conditional, self.disc_num_classes = disc_conditional, disc_num_classes
        self.d_loss, self.g_loss = GAN_LOSSES[disc_loss]
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)
        self.perceptual_loss = None
        if perceptual_weight != 0:
            self.perceptual_loss = _perceptual_network(perceptual, vgg_path, lpips_path)
        self.discriminator = None
        if disc_factor != 0 and disc_weight != 0:
            self.discriminator = NLayerDiscriminator(
                disc_in_channels, disc_ndf, disc_num_layers, use_actnorm, disc_num_classes
            )

    @property
    def uses_discriminator(self) -> bool:
        """Whether there is a discriminator at all, and so a second optimizer."""
        return self.discriminator is not None

    def discriminator_active(self, step: int) -> bool:
        """Whether it takes part at `step`, the number of autoencoder optimizer steps taken so far."""
        return self.uses_discriminator and step >= self.disc_start

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """What the autoencoder's optimizer trains here beside the autoencoder: `logvar`, if learned."""
        return [self.logvar] if self.logvar.requires_grad else []

    def discriminator_parameters(self) -> list[nn.Parameter]:
        return list(self.discriminator.parameters()) if self.discriminator is not None else []

    def generator_loss(
        self,
        x: Tensor,
        reconstruction: Tensor,
        regulariser: DiagonalGaussian | VQOutput,
        step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's loss () and its parts, detached.

        Images (B, C, H, W) in [-1, 1]; `regulariser` what the model returned beside the reconstruction;
        `last_layer` = model.last_layer. No gradient reaches the discriminator's parameters. Without gradients
        (validation), the adversarial term is reported as `g_loss` and counts 0, for its weight cannot be
        measured.
        """
        if x.shape != reconstruction.shape:
            shapes = f"{tuple(x.shape)} and {tuple(reconstruction.shape)}"
            raise ValueError(f"the shapes of image and reconstruction differ: {shapes}")
        x, reconstruction = x.float(), reconstruction.float()
        nll, penalty, logs = self._reconstruction(x, reconstruction, regulariser)
        g_loss = d_weight = torch.zeros_like(nll)
        active = self.discriminator_active(step)
        if active:
            with parameters_held(self.discriminator):
                fake = self._logits(reconstruction, cond)
            g_loss = self.g_loss(fake)
            if torch.is_grad_enabled():
                if last_layer is None:
                    raise ValueError("last_layer is needed from disc_start on, for the adaptive weight")
                d_weight = self.disc_weight * adaptive_weight(nll, g_loss, last_layer)
        disc_factor = self.disc_factor if active else 0.0
        loss = nll + penalty + d_weight * disc_factor * g_loss
        logs |= {"total_loss": loss, "g_loss": g_loss, "d_weight": d_weight}
        logs["disc_factor"] = torch.full_like(nll, disc_factor)
        return loss, {name: value.detach() for name, value in logs.items()}

    def discriminator_loss(
        self, x: Tensor, reconstruction: Tensor, step: int, cond: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss () and its parts, detached; nothing else receives a gradient.

        Before `disc_start` the loss is a zero that depends on no parameter, and the logs are empty.
        ValueError without a discriminator.
        """
        if self.discriminator is None:
            raise ValueError("there is no discriminator: disc_factor or disc_weight is 0")
        if not self.discriminator_active(step):
            return torch.zeros((), device=x.device, requires_grad=True), {}
        real = self._logits(x.detach().float(), cond)
        fake = self._logits(reconstruction.detach().float(), cond)
        loss = self.disc_factor * self.d_loss(real, fake)
        logs = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}

    def checkpoint_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen perceptual network (`FROZEN_PREFIX`), whose file is published."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith(FROZEN_PREFIX)}

    def load_checkpoint_state(self, state: dict[str, Tensor]) -> None:
        """The counterpart of `checkpoint_state`: strict for every name but the frozen network's."""
        frozen = {name: value for name, value in self.state_dict().items() if name.startswith(FROZEN_PREFIX)}
        self.load_state_dict({**frozen, **state})

    def _reconstruction(
        self, x: Tensor, reconstruction: Tensor, regulariser: DiagonalGaussian | VQOutput
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """nll and weighted regulariser, both (), in the unit of `normalize`; and the logs."""
        distance = self.perceptual_loss(x, reconstruction) if self.perceptual_loss is not None else None
        with autocast_off(x):
            difference = x - reconstruction
            rec = self.pixel_weight * (difference.abs() if self.pixel == "l1" else difference.square())
            logs = {}
            if distance is not None:
                rec = rec + self.perceptual_weight * distance  # (B, C, H, W) + (B, 1, 1, 1)
                logs["p_loss"] = distance.mean()
            logs["rec_loss"] = rec.mean()
            elements = x[0].numel()
            if isinstance(regulariser, DiagonalGaussian):
                nll = (rec / self.logvar.exp() + self.logvar).sum() / x.shape[0]
                kl = regulariser.kl().sum() / x.shape[0]
                scale = 1.0 / elements if self.normalize == "element" else 1.0
                penalty = self.kl_weight * kl
                logs |= {"kl_loss": kl, "logvar": self.logvar}
            elif isinstance(regulariser, VQOutput):
                nll = rec.mean()
                scale = float(elements) if self.normalize == "batch" else 1.0
                penalty = self.codebook_weight * regulariser.codebook_loss
                logs |= {"quant_loss": regulariser.codebook_loss, "perplexity": regulariser.perplexity}
                logs["codebook_use"] = regulariser.codebook_use
            else:
                kind = type(regulariser).__name__
                raise ValueError(f"expected the model's DiagonalGaussian or VQOutput, got {kind}")
            logs["nll_loss"] = nll * scale
        return nll * scale, penalty * scale, logs

    def _logits(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """Patch logits in float32; the convolutions run in the surrounding precision."""
        if self.disc_conditional != (cond is not None):
            given = "missing" if cond is None else "given"
            raise ValueError(f"disc_conditional is {self.disc_conditional}, and a condition is {given}")
        if cond is None:
            return self.discriminator(x).float()
        if self.disc_num_classes is not None:
            return self.discriminator(x, cond).float()
        if cond.ndim != 4 or cond.shape[0] != x.shape[0] or cond.shape[2:] != x.shape[2:]:
            raise ValueError(f"the condition {tuple(cond.shape)} does not lie beside images {tuple(x.shape)}")
        return self.discriminator(torch.cat([x, cond.to(x.dtype)], dim=1)).float()


def _perceptual_network(choice: str | nn.Module | None, vgg_path, lpips_path) -> nn.Module | None:
    if choice is None or isinstance(choice, nn.Module):
        return choice
    check_choice("perceptual", choice, ("lpips", "efficientnet"))
    return LPIPS(vgg_path, lpips_path) if choice == "lpips" else EfficientNetPerceptual()
