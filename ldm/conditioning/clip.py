"""CLIP's text encoder under the parameter names of Hugging Face transformers (Stable Diffusion 1, SDXL).

Radford et al. 2021 (https://arxiv.org/abs/2103.00020, section 2.4): a causal, pre-norm transformer.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning.text import (
    TextEmbedder,
    Tokenizer,
    at_end_of_text,
    make_activation,
    transformers_tokenizer,
)
from ldm.models.vit import Mlp
from ldm.nn.sequence_attention import attend_tokens, check_divides
from ldm.wording import check_choice

START, END = 49406, 49407


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        check_divides("CLIP: heads", heads, width)
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend_tokens(q, k, v, self.heads, causal=True))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, activation: str):
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        self.mlp.act = make_activation(activation)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _TextTransformer(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        activation: str,
    ):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(vocab_size, width)
        self.embeddings.position_embedding = nn.Embedding(max_length, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(width, heads, hidden, activation) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, count: int | None = None) -> Tensor:
        """(B, N) -> (B, N, width) after the first `count` layers, all if None, before the last norm."""
        positions = self.embeddings.position_embedding.weight[: tokens.shape[1]]
        x = self.embeddings.token_embedding(tokens) + positions
        for layer in self.encoder.layers[:count]:
            x = layer(x)
        return x


@remembers_arguments
class CLIPTextEmbedder(TextEmbedder):
    """Texts -> CLIP's token features (B, 77, width); with `pooled`, also one vector (B, width) a text.

    Parameters are `transformer.text_model. ...`, as in the original's FrozenCLIPEmbedder. The defaults are
    `openai/clip-vit-large-patch14` (123.06 M parameters).

    Args:
        key, drop, absent: see `TextEmbedder`.
        layer: "last", normed; "hidden", the output of `layer_index` layers, not normed, as in SDXL;
            "pooled", the normed features at the end of the text, as one token.
        layer_index: number of layers for "hidden"; negative counts from the end, -1 being all.
        pooled: also return the vector.
        vocab_size, max_length, width, layers, heads, mlp_width, activation: of the transformer; mlp_width
            None is 4 width.
        tokenizer: name on the hub, or a folder with the vocabulary; read when the first text comes.
    """

    def __init__(
        self,
        key: str = "txt",
        layer: Literal["last", "hidden", "pooled"] = "last",
        layer_index: int | None = None,
        pooled: bool = False,
        drop: float = 0.0,
        absent: Literal["empty", "zeros"] = "empty",
        vocab_size: int = 49408,
        max_length: int = 77,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_width: int | None = None,
        activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
        tokenizer: str = "openai/clip-vit-large-patch14",
    ):
        super().__init__(key, drop, max_length, absent, ("crossattn", "vector") if pooled else ("crossattn",))
        check_choice("CLIPTextEmbedder: layer", layer, ("last", "hidden", "pooled"))
        if (layer == "hidden") != (layer_index is not None):
            raise ValueError(f"CLIPTextEmbedder: layer_index={layer_index} with layer={layer!r}")
        if layer_index is not None and not -(layers + 1) <= layer_index <= layers:
            raise ValueError(f"CLIPTextEmbedder: layer_index={layer_index} of {layers} layers")
        self.layer, self.pooled, self.vocab_size, self.source = layer, pooled, vocab_size, tokenizer
        # Counted as transformers' hidden_states are: 0 is the embeddings, -1 the last layer's output.
        self.count = layers if layer_index is None else layer_index % (layers + 1)
        hidden = 4 * width if mlp_width is None else mlp_width
        self.transformer = nn.Module()
        self.transformer.text_model = _TextTransformer(
            vocab_size, max_length, width, layers, heads, hidden, activation
        )

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        model = self.transformer.text_model
        hidden = model(tokens, self.count)
        if self.layer == "hidden" and not self.pooled:
            return {"crossattn": hidden}
        last = hidden
        for layer in model.encoder.layers[self.count :]:
            last = layer(last)
        last = model.final_layer_norm(last)
        vector = at_end_of_text(last, tokens)
        features = {"hidden": hidden, "last": last, "pooled": vector[:, None]}[self.layer]
        return {"crossattn": features} | ({"vector": vector} if self.pooled else {})

    def empty_tokens(self) -> Tensor:
        if self.vocab_size <= END:
            raise self.no_null_values()
        return torch.tensor([START] + [END] * (self.max_length - 1))  # padded with the end

    def make_tokenizer(self) -> Tokenizer:
        return transformers_tokenizer("CLIPTokenizer", self.source, self.max_length)
