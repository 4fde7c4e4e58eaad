"""What the perceptual distances share: a frozen network, colour channels, unit-length features."""

from torch import Tensor, nn


class FrozenNetwork(nn.Module):
    """A network that is never trained: its parameters take no gradient, its input still does, and `.train()`
    leaves it in evaluation mode."""

    def freeze(self) -> None:
        """Call at the end of `__init__`, when every parameter exists."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        return super().train(False)


def as_rgb(x: Tensor, name: str = "image") -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W), a grayscale image repeated; ValueError for other channels."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, 1, H, W) or (B, 3, H, W)")
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"images of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")


def unit_length(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Each position's feature vector (B, C, H, W) scaled to length 1 over C, in float32.

    The square root is taken of max(|f|^2, eps^2): the value is the published f / (|f| + eps), but where all
    features are zero (dead ReLUs, black images) the gradient is finite and not NaN.
    """
    features = features.float()
    length = features.square().sum(dim=1, keepdim=True).clamp_min(eps**2).sqrt()  # (B, 1, H, W)
    return features / (length + eps)
