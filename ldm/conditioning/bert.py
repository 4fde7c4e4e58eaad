"""The original latent diffusion's own text transformer: BERT's vocabulary, trained together with the UNet.

Rombach et al. 2021 (https://arxiv.org/abs/2112.10752, section 4.3.1, appendix E.2.1). Parameter names are
those of the repository's copy of x-transformers.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.conditioning.text import TextEmbedder, Tokenizer, transformers_tokenizer
from ldm.nn.attention import CrossAttention
from ldm.nn.transformer import FeedForward

START, END = 101, 102  # [CLS] and [SEP] of bert-base-uncased; 0 pads


class _Attention(CrossAttention):
    """To itself, and without a dropout behind `to_out`, which changes the parameters' names."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__(dim, heads=heads, dim_head=dim_head)
        self.to_out = self.to_out[0]


class _Layers(nn.Module):
    """Alternating attention and feed-forward steps, each a pair of its norm and itself."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), _Attention(dim, heads, dim_head)]))
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), FeedForward(dim)]))

    def forward(self, x: Tensor) -> Tensor:
        for norm, step in self.layers:
            x = x + step(norm(x))
        return x


class TokenTransformer(nn.Module):
    """Tokens (B, N) -> features (B, N, dim), every token seeing all.

    `to_logits` stands in the published weights, for language modelling that was never done; it is frozen.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        dropout: float,
    ):
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, dim)
        self.pos_emb = nn.Module()
        self.pos_emb.emb = nn.Embedding(max_length, dim)
        self.emb_dropout = nn.Dropout(dropout)
        self.attn_layers = _Layers(dim, depth, heads, dim_head)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocab_size)
        self.to_logits.requires_grad_(False)
        for table in (self.token_emb, self.pos_emb.emb):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens) + self.pos_emb.emb.weight[: tokens.shape[1]]
        return self.norm(self.attn_layers(self.emb_dropout(x)))


@remembers_arguments
class BERTEmbedder(TextEmbedder):
    """Texts, or any tokens such as those of bounding boxes, -> features (B, N, dim) for cross-attention.

    Parameters are `transformer. ...`, as in the original's BERTEmbedder and TransformerEmbedder.

    Args:
        dim, depth: channels, and number of pairs of attention and feed-forward.
        key, drop: see `TextEmbedder`.
        vocab_size, max_length: of the tokens.
        texts: False takes token numbers only, and knows no empty text.
        heads, dim_head, dropout: of the transformer, dropout behind the embeddings.
        tokenizer: name on the hub, or a folder with the vocabulary; read when the first text comes.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        key: str = "caption",
        vocab_size: int = 30522,
        max_length: int = 77,
        texts: bool = True,
        drop: float = 0.0,
        absent: Literal["empty", "zeros"] = "empty",
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        tokenizer: str = "bert-base-uncased",
    ):
        super().__init__(key, drop, max_length, absent)
        if drop > 0 and not texts and absent == "empty":
            raise ValueError("BERTEmbedder: drop > 0 needs texts=True or absent='zeros'")
        self.texts, self.source = texts, tokenizer
        self.transformer = TokenTransformer(vocab_size, max_length, dim, depth, heads, dim_head, dropout)

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"crossattn": self.transformer(tokens)}

    def empty_tokens(self) -> Tensor:
        if not self.texts:
            raise self.no_null_values()
        return torch.tensor([START, END] + [0] * (self.max_length - 2))

    def make_tokenizer(self) -> Tokenizer:
        if not self.texts:
            raise ValueError(f"BERTEmbedder: {self.key!r} must hold token numbers (B, N), not texts")
        return transformers_tokenizer("BertTokenizer", self.source, self.max_length)
