"""Text as a condition: what all text encoders share, and their tokenizers."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import Embedder, zero_dropped
from ldm.wording import check_choice

Tokenizer = Callable[[Sequence[str]], Tensor]


class TextEmbedder(Embedder):
    """Texts, or their token numbers (B, N) int64, -> tokens for cross-attention and, if asked for, a vector.

    A subclass has `encode(tokens) -> {kind: tensor}` and `empty_tokens() -> (max_length,)`, the token numbers
    of the empty text. Token numbers in the batch need no tokenizer; `tokenizer` may be set to any function
    from a list of texts to (B, N) int64.

    Args:
        key: of the batch.
        drop: see `Embedder`.
        max_length: tokens of a text; longer texts are cut, shorter ones padded.
        absent: what stands for no text: "empty", the embedding of the empty text, or "zeros".
        returns: kinds of the result; the first is `kind`.
    """

    def __init__(
        self,
        key: str,
        drop: float,
        max_length: int,
        absent: Literal["empty", "zeros"] = "empty",
        returns: Sequence[str] = ("crossattn",),
    ):
        super().__init__(key, returns[0], drop)
        check_choice(f"{type(self).__name__}: absent", absent, ("empty", "zeros"))
        self.max_length, self.absent, self.returns = max_length, absent, tuple(returns)
        self.tokenizer: Tokenizer | None = None

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        """(B, N) int64 -> {"crossattn": (B, N, D), "vector": (B, D')}, those that the embedder returns."""
        raise NotImplementedError

    def empty_tokens(self) -> Tensor:
        """(max_length,) int64: the empty text."""
        raise NotImplementedError

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the weights; loaded at first use."""
        raise NotImplementedError

    def embed(self, values: Sequence[str] | Tensor, dropped: Tensor | None) -> dict[str, Tensor]:
        tokens = self.tokenize(values)
        if dropped is None or self.absent == "zeros":
            return {kind: zero_dropped(value, dropped) for kind, value in self.encode(tokens).items()}
        empty = self.empty_tokens().to(tokens.device)
        if tokens.shape[1] != len(empty):
            lengths = f"{tokens.shape[1]} tokens, the empty one {len(empty)}"
            raise ValueError(f"{type(self).__name__}: texts have {lengths}; pad them")
        return self.encode(torch.where(dropped.to(tokens.device)[:, None], empty, tokens))

    def null_values(self, batch_size: int, device: torch.device) -> Tensor:
        if self.absent == "zeros":  # whatever is embedded is set to zero
            return torch.zeros(batch_size, self.max_length, dtype=torch.int64, device=device)
        return self.empty_tokens().to(device).expand(batch_size, -1)

    def from_text(self, text: str) -> str:
        return text

    def tokenize(self, values: Sequence[str] | Tensor) -> Tensor:
        """Texts, or what is already (B, N) int64, -> token numbers on the embedder's device; ValueError for
        anything else, and for more than `max_length`."""
        device = next(self.parameters()).device
        name = type(self).__name__
        if isinstance(values, Tensor):
            if values.ndim != 2 or values.dtype not in (torch.int32, torch.int64):
                given = f"{values.dtype} {tuple(values.shape)}"
                raise ValueError(f"{name}: token numbers must be int64 (B, N), got {given}")
            tokens = values
        else:
            values = [values] if isinstance(values, str) else list(values)
            if not all(isinstance(text, str) for text in values):
                raise ValueError(f"{name}: {self.key!r} must hold texts or token numbers (B, N)")
            self.tokenizer = self.tokenizer or self.make_tokenizer()
            tokens = self.tokenizer(values)
        if not 1 <= tokens.shape[1] <= self.max_length:
            raise ValueError(f"{name}: {tokens.shape[1]} tokens a text, at most {self.max_length} are taken")
        return tokens.to(device=device, dtype=torch.int64)


def transformers_tokenizer(kind: str, source: str, max_length: int) -> Tokenizer:
    """A tokenizer of the `transformers` package, padding to `max_length`.

    `kind` is its class; `source` a name on the Hugging Face hub, or a folder with the vocabulary (OSError
    where that is not to be had).
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("texts need transformers: pip install 'ldm-toolkit[text]'") from error
    tokenizer = getattr(transformers, kind).from_pretrained(source)

    def tokenize(texts: Sequence[str]) -> Tensor:
        batch = tokenizer(
            list(texts), truncation=True, max_length=max_length, padding="max_length", return_tensors="pt"
        )
        return batch["input_ids"]

    return tokenize


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


def make_activation(name: str) -> nn.Module:
    """`gelu` or `quick_gelu`."""
    check_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def at_end_of_text(hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, D) -> (B, D): the features at the end-of-text token, which has the highest number of CLIP's."""
    return hidden[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]
