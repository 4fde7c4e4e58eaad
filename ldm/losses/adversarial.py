"""Adversarial losses on patch logits, and the weight that balances them against the reconstruction."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.nn.precision import autocast_off


def hinge_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator: (E max(0, 1 - real) + E max(0, 1 + fake)) / 2 (Lim and Ye 2017, arXiv:1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def cross_entropy_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator: (E softplus(-real) + E softplus(fake)) / 2, cross entropy (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def linear_g_loss(fake: Tensor) -> Tensor:
    """Generator: -E fake, which the original latent diffusion code pairs with hinge and with vanilla."""
    return -fake.mean()


def nonsaturating_g_loss(fake: Tensor) -> Tensor:
    """Generator: E softplus(-fake) = -E log D(fake) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


# name -> (discriminator's loss of real and fake logits, generator's loss of fake logits)
GAN_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (hinge_d_loss, linear_g_loss),
    "vanilla": (cross_entropy_d_loss, linear_g_loss),
    "nonsaturating": (cross_entropy_d_loss, nonsaturating_g_loss),
}


def adaptive_weight(reconstruction_loss: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
    """|grad reconstruction_loss| / (|grad g_loss| + 1e-4) at `last_layer`, within [0, 1e4], detached.

    Esser et al. 2020 (arXiv:2012.09841), eq. 7. The gradients are taken on the side: no `.grad` changes, and
    both graphs stay for the backward pass. Each micro-batch of an accumulated step has a weight of its own.
    """
    # float32 operations of the forward pass must not be repeated in half precision on the way back
    with autocast_off(last_layer):
        norms = [
            _gradient(loss, last_layer, name).float().norm()
            for loss, name in ((reconstruction_loss, "reconstruction"), (g_loss, "adversarial"))
        ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()


def _gradient(loss: Tensor, last_layer: Tensor, name: str) -> Tensor:
    gradient = None
    if loss.requires_grad and last_layer.requires_grad:
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"the {name} loss does not depend on last_layer, of shape {tuple(last_layer.shape)}")
    return gradient


@contextmanager
def parameters_held(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass of `module` records no gradient for its parameters; its input still gets one."""
    taking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)
