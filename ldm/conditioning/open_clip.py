"""CLIP's text encoder under the parameter names of open_clip (Stable Diffusion 2, SDXL's second).

Cherti et al. 2022 (https://arxiv.org/abs/2212.07143); the architecture is that of `ldm.conditioning.clip`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning.clip import END, START
from ldm.conditioning.text import (
    TextEmbedder,
    Tokenizer,
    at_end_of_text,
    make_activation,
    transformers_tokenizer,
)
from ldm.nn.sequence_attention import attend_tokens, check_divides
from ldm.wording import check_choice


class _PackedAttention(nn.Module):
    """Causal self-attention with q, k and v in one matrix, named as torch's MultiheadAttention names it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        check_divides("OpenCLIP: heads", heads, width)
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend_tokens(q, k, v, self.heads, causal=True))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _PackedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", make_activation(activation))
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OpenCLIPText(nn.Module):
    """The text half of open_clip's CLIP class; `logit_scale` belongs to its training and is not used."""

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        activation: str,
    ):
        super().__init__()
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(max_length, width))
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.ones([]), requires_grad=False)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(_Block(width, heads, activation) for _ in range(layers))
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = nn.LayerNorm(width)


@remembers_arguments
class OpenCLIPTextEmbedder(TextEmbedder):
    """Texts -> OpenCLIP's token features (B, 77, width), and with `pooled` also one vector (B, embed_dim).

    Parameters are `model. ...`, as in the originals' FrozenOpenCLIPEmbedder and FrozenOpenCLIPEmbedder2. The
    defaults are ViT-H-14, Stable Diffusion 2's (354.03 M parameters).

    Args:
        key, drop, absent: see `TextEmbedder`.
        layer: "last", or "penultimate": the output of all layers but one.
        normed: whether the last norm is applied to the token features (SD 2: yes; SDXL: no).
        pooled: also return the vector: the normed last features at the end of the text, projected.
        vocab_size, max_length, width, layers, heads, embed_dim, activation: of the transformer.
        tokenizer: name on the hub, or a folder with the vocabulary; read when the first text comes.
    """

    def __init__(
        self,
        key: str = "txt",
        layer: Literal["last", "penultimate"] = "penultimate",
        normed: bool = True,
        pooled: bool = False,
        drop: float = 0.0,
        absent: Literal["empty", "zeros"] = "empty",
        vocab_size: int = 49408,
        max_length: int = 77,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        embed_dim: int = 1024,
        activation: Literal["gelu", "quick_gelu"] = "gelu",
        tokenizer: str = "openai/clip-vit-large-patch14",
    ):
        super().__init__(key, drop, max_length, absent, ("crossattn", "vector") if pooled else ("crossattn",))
        check_choice("OpenCLIPTextEmbedder: layer", layer, ("last", "penultimate"))
        self.count = layers - (layer == "penultimate")
        self.normed, self.pooled, self.vocab_size, self.source = normed, pooled, vocab_size, tokenizer
        self.model = OpenCLIPText(vocab_size, max_length, width, layers, heads, embed_dim, activation)

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        model = self.model
        x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
        for block in model.transformer.resblocks[: self.count]:
            x = block(x)
        features = {"crossattn": model.ln_final(x) if self.normed else x}
        if self.pooled:
            for block in model.transformer.resblocks[self.count :]:
                x = block(x)
            features["vector"] = at_end_of_text(model.ln_final(x), tokens) @ model.text_projection
        return features

    def empty_tokens(self) -> Tensor:
        if self.vocab_size <= END:
            raise self.no_null_values()
        return torch.tensor([START, END] + [0] * (self.max_length - 2))  # padded with zeros

    def make_tokenizer(self) -> Tokenizer:
        tokenize = transformers_tokenizer("CLIPTokenizer", self.source, self.max_length)

        def with_zeros(texts) -> Tensor:
            tokens = tokenize(texts)
            behind = torch.arange(tokens.shape[1]) > tokens.argmax(dim=-1, keepdim=True)
            return tokens.masked_fill(behind, 0)  # transformers pads with the end-of-text token

        return with_zeros
