"""The posterior of a KL autoencoder: a diagonal Gaussian over the latent."""

import math

import torch
from torch import Tensor


class DiagonalGaussian:
    """N(mean, diag(std^2)) from `parameters` (B, 2C, H, W): the means, then the log variances.

    Computed in float32 whatever precision produced the parameters; log variances are clamped to [-30, 20], as
    in the latent diffusion code. Sums run over everything but the batch.
    """

    def __init__(self, parameters: Tensor):
        if parameters.ndim < 2 or parameters.shape[1] % 2:
            raise ValueError(f"expected (B, 2C, ...) means and log variances, got {tuple(parameters.shape)}")
        self.parameters = parameters
        mean, logvar = parameters.float().chunk(2, dim=1)
        self.mean: Tensor = mean
        self.logvar: Tensor = logvar.clamp(-30.0, 20.0)
        self.std: Tensor = (0.5 * self.logvar).exp()
        self.var: Tensor = self.logvar.exp()

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise; `noise` standard normal (B, C, H, W), from torch's generator otherwise."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        elif noise.shape != self.mean.shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} for a latent of {tuple(self.mean.shape)}")
        return self.mean + self.std * noise

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL(self || other), `other` N(0, 1) where not given: (B,), in nats."""
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() / other.var
            terms = distance + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)

    def nll(self, x: Tensor) -> Tensor:
        """-log N(x; mean, std^2): (B,), in nats."""
        terms = math.log(2.0 * math.pi) + self.logvar + (x - self.mean).square() / self.var
        return 0.5 * terms.flatten(1).sum(dim=1)
