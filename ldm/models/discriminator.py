"""The PatchGAN discriminator of the autoencoder's adversarial loss (Isola et al. 2017, arXiv:1611.07004)."""

import torch
import torch.distributed
from torch import Tensor, nn

from ldm.arguments import remembers_arguments


class ActNorm(nn.Module):
    """y = scale * (x + loc) per channel, set from the first training batch to zero mean and unit variance.

    Glow (Kingma and Dhariwal 2018, arXiv:1807.03039), section 3.1. The buffer `initialized` travels with the
    state dict, so that a reloaded layer is not set anew. In a process group the statistics are those of all
    ranks. Raises RuntimeError where it is used in evaluation mode before it has seen data.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._ready = False  # spares reading the buffer, a host sync, at every step
        self.register_load_state_dict_post_hook(_forget_ready)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self._ready:
            if not self.initialized.item():
                self._initialize(x)
            self._ready = True
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if not self.training:
            raise RuntimeError("ActNorm is not initialized: that takes a batch in training mode, or weights")
        values = x.float()
        moments = torch.stack([values.mean(dim=(0, 2, 3)), values.square().mean(dim=(0, 2, 3))])  # (2, C)
        count = values.numel() // values.shape[1]
        variance = values.var(dim=(0, 2, 3), correction=1 if count > 1 else 0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            if ranks > 1:
                torch.distributed.all_reduce(moments)
                moments /= ranks
                variance = moments[1] - moments[0].square()
        self.loc.copy_(-moments[0].view_as(self.loc))
        self.scale.copy_((1 / (variance.clamp_min(0).sqrt() + 1e-6)).view_as(self.scale))
        self.initialized.fill_(1)


def _forget_ready(module: ActNorm, _incompatible) -> None:
    module._ready = False


def weights_init(module: nn.Module) -> None:
    """DCGAN's initialization, for `module.apply`: kernels N(0, 0.02), BatchNorm scales N(1, 0.02)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


@remembers_arguments
class NLayerDiscriminator(nn.Module):
    """Judges overlapping patches as real or generated: (B, input_nc, H, W) -> logits (B, 1, H', W').

    `n_layers` convolutions of stride 2 (3: receptive field 70x70). `use_actnorm`: ActNorm instead of
    BatchNorm. Conditions: an image-like one is concatenated by the caller, `discriminator(torch.cat([x,
    cond], 1))`, and counted in `input_nc`; a class label with `num_classes` is embedded (`class_map`,
    `class_channels` numbers a class) and laid beside the image as constant maps. Weights start as in
    `weights_init`. ValueError for images smaller than `smallest` pixels.
    """

    def __init__(
        self,
        input_nc: int = 3,
        ndf: int = 64,
        n_layers: int = 3,
        use_actnorm: bool = False,
        num_classes: int | None = None,
        class_channels: int = 8,
    ):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}")
        self.input_nc, self.num_classes = input_nc, num_classes
        self.smallest = 3 * 2**n_layers
        if num_classes is not None:
            self.class_map = nn.Embedding(num_classes, class_channels)
        channels = input_nc + (class_channels if num_classes is not None else 0)
        layers = [nn.Conv2d(channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        channels = ndf
        for n in range(1, n_layers + 1):
            width = ndf * min(2**n, 8)
            layers += [
                # BatchNorm has a shift of its own
                nn.Conv2d(channels, width, 4, stride=2 if n < n_layers else 1, padding=1, bias=use_actnorm),
                ActNorm(width) if use_actnorm else nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(weights_init)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images in [-1, 1]; `labels` (B,) int64 exactly when the discriminator has `num_classes`."""
        if x.ndim != 4 or x.shape[1] != self.input_nc or min(x.shape[-2:]) < self.smallest:
            expected = f"(B, {self.input_nc}, H, W) with H and W at least {self.smallest}"
            raise ValueError(f"the discriminator takes {expected}, got {tuple(x.shape)}")
        if (labels is None) != (self.num_classes is None):
            given = "missing" if labels is None else "given"
            raise ValueError(f"labels are {given}, and the discriminator has num_classes={self.num_classes}")
        if labels is not None:
            maps = self.class_map(labels)[:, :, None, None].expand(-1, -1, *x.shape[-2:])
            x = torch.cat([x, maps.to(x.dtype)], dim=1)
        return self.main(x)
