"""An image as a condition: variations of it, or images in its manner."""

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.arguments import remembers_arguments
from ldm.conditioning.conditioner import Embedder, zero_dropped
from ldm.models.vit import VisionTransformer, fit_positions
from ldm.wording import check_choice, some

#: Mean and deviation, in [0, 1], that an encoder's weights expect to be taken out of its images.
_NORMALIZATIONS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_HEADS = ("head.", "head_dist.", "pre_logits.")


@remembers_arguments
class ImageEmbedder(Embedder):
    """Images (B, C, H, W) in [-1, 1] -> features of a Vision Transformer; no image is zeros.

    As `crossattn` the class token and one token a patch, (B, 1 + N, dim), from which samples come close to
    the image; as `vector` the class token alone, (B, dim), which leaves more open. Images of another size
    than the encoder's are resized with antialiasing, grey ones are repeated for an encoder of colours.
    Training needs the images themselves beside the latents: `cache: false`.

    Args:
        model: the encoder, a VisionTransformer; its head is not used, `num_classes: 0` leaves it out.
        dim: of the condition, by a linear layer that is trained; None keeps the encoder's width.
        kind: "crossattn" or "vector".
        drop, key: see `Embedder`.
        trainable: train the encoder too; otherwise it stays as it is, in evaluation mode.
        weights: a run folder or file that training takes the encoder's weights from, when a run begins. A
            trained model holds them itself.
        normalization: of the images, as the weights expect it: "half" keeps [-1, 1] (ViT's authors, this
            toolkit's classifiers); "imagenet" takes out ImageNet's mean and deviation (DeiT).

    Raises:
        ValueError: an unknown kind or normalization, or an encoder that is no VisionTransformer.
    """

    kinds = ("crossattn", "vector")

    def __init__(
        self,
        model: VisionTransformer,
        dim: int | None = None,
        kind: Literal["crossattn", "vector"] = "crossattn",
        drop: float = 0.1,
        key: str = "image",
        trainable: bool = False,
        weights: str | None = None,
        normalization: Literal["half", "imagenet"] = "half",
    ):
        super().__init__(key, kind, drop)
        check_choice("ImageEmbedder: normalization", normalization, _NORMALIZATIONS)
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"ImageEmbedder: model must be a VisionTransformer, got {type(model).__name__}")
        self.model, self.trainable, self.weights = model, trainable, weights
        width = model.embed_dim
        self.proj = nn.Identity() if dim in (None, width) else nn.Linear(width, dim)
        mean, std = (torch.tensor(numbers)[None, :, None, None] for numbers in _NORMALIZATIONS[normalization])
        # From [-1, 1]: (x / 2 + 1 / 2 - mean) / std.
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        # Nothing of the encoder that gives no features is trained.
        model.requires_grad_(trainable)
        for name, parameter in model.named_parameters():
            if name.startswith(_HEADS):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "ImageEmbedder":
        super().train(mode)
        if not self.trainable:
            self.model.eval()
        return self

    def take_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the encoder from a classifier's state dict, strictly but for the classifier's head; positions
        are interpolated to the encoder's grid. ValueError says which names or shapes differ.
        """
        own = self.model.state_dict()
        heads = {name: value for name, value in own.items() if name.startswith(_HEADS)}
        given = {name: value for name, value in state_dict.items() if not name.startswith(_HEADS)}
        wanted = own.keys() - heads.keys()
        _refuse({"missing": wanted - given.keys(), "not known": given.keys() - wanted})
        given = fit_positions(given, self.model)
        shapes = {name: (tuple(value.shape), tuple(own[name].shape)) for name, value in given.items()}
        _refuse({"other shapes": [f"{n} {a} instead of {b}" for n, (a, b) in shapes.items() if a != b]})
        self.model.load_state_dict({**heads, **given})

    def values_in(self, batch: dict) -> Tensor:
        if self.key not in batch and "mean" in batch:
            raise ValueError(f"{self.key!r}: cached latents come without the images; set cache=false")
        return super().values_in(batch)

    def embed(self, values: Tensor, dropped: Tensor | None) -> Tensor:
        if values.ndim != 4:
            raise ValueError(f"{self.key!r} must hold images (B, C, H, W), got {tuple(values.shape)}")
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            features = self.model.forward_features(self._prepared(values))  # (B, prefix + N, width)
        if self.kind == "vector":
            features = features[:, 0]
        elif self.model.num_prefix_tokens > 1:
            features = torch.cat([features[:, :1], features[:, self.model.num_prefix_tokens :]], dim=1)
        return zero_dropped(self.proj(features), dropped)

    def null_values(self, batch_size: int, device: torch.device) -> Tensor:
        height, width = self._size()
        return torch.zeros(batch_size, self.model.patch_embed.in_channels, height, width, device=device)

    def _prepared(self, images: Tensor) -> Tensor:
        """In the encoder's channels, size and normalization."""
        given, wanted = images.shape[1], self.model.patch_embed.in_channels
        if given == 1:
            images = images.expand(-1, wanted, -1, -1)
        elif given != wanted:
            raise ValueError(f"ImageEmbedder: {self.key!r} has {given} channels, the encoder takes {wanted}")
        if tuple(images.shape[2:]) != self._size():
            images = F.interpolate(images, self._size(), mode="bicubic", antialias=True)
        return images * self.scale[:, :wanted] + self.shift[:, :wanted]

    def _size(self) -> tuple[int, int]:
        patches, sides = self.model.grid_size, self.model.patch_embed.patch_size
        return patches[0] * sides[0], patches[1] * sides[1]


def _refuse(problems: Mapping[str, Collection[str]]) -> None:
    """ValueError with every kind of problem that there are names for."""
    found = [f"{kind}: {some(sorted(names), 10)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"ImageEmbedder: the weights do not fit the encoder: {'; '.join(found)}")
