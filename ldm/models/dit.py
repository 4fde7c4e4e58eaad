"""The diffusion transformer (DiT), a denoiser beside the UNet, with what later work added to it.

Follows Peebles & Xie 2022 (https://arxiv.org/abs/2212.09748, section 3.2, adaLN-Zero) with the parameter
names of facebookresearch/DiT, which willisma/SiT (https://arxiv.org/abs/2401.08740) shares; the names of
RMSNorm, SwiGLU and QK-norm are those of hustvl/LightningDiT (https://arxiv.org/abs/2501.01423).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.arguments import remembers_arguments
from ldm.models.network_inputs import check_inputs
from ldm.models.vit import Mlp, published_numbers
from ldm.nn.checkpoint import checkpoint
from ldm.nn.init import zero_module
from ldm.nn.patch import PatchEmbed, Size, as_pair, rotary_positions, sincos_positions, unpatchify
from ldm.nn.sequence_attention import ContextAttention, RMSNorm, ViTAttention
from ldm.nn.timestep import embedding_mlp, timestep_embedding
from ldm.nn.transformer import SwiGLU
from ldm.wording import check_choice

_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

#: "DiT-S/2" and so on -> arguments of `DiT` (Peebles & Xie 2022, table 1), with patches of 1, 2, 4 and 8.
DIT_SIZES: dict[str, dict[str, int]] = {
    f"DiT-{name}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for name, (width, depth, heads) in _WIDTHS.items()
    for patch in (1, 2, 4, 8)
}

_FREQUENCIES = 256  # channels of the sinusoidal time embedding


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with x (B, N, D) and one shift and scale (B, D) for all tokens."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _norm(kind: str, dim: int) -> nn.Module:
    """Without parameters for "layer", since the modulation scales and shifts; "rms" has a weight."""
    if kind == "layer":
        return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    return RMSNorm(dim)


def _modulation(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class VectorEmbedder(nn.Module):
    """Conditioning vectors (B, in_channels) -> (B, dim) through a small network."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.mlp = embedding_mlp(in_channels, dim)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.mlp(vectors.to(self.mlp[0].weight.dtype))


class TimestepEmbedder(VectorEmbedder):
    """Sinusoidal features of the time through a small network: (B,) -> (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__(_FREQUENCIES, dim)

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(timestep_embedding(t, _FREQUENCIES))


class LabelEmbedder(nn.Module):
    """Class numbers (B,) -> (B, dim). The table's last row is the null class: number `num_classes`, or -1."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(torch.where(labels == -1, self.num_classes, labels))


def _label_embedder(num_classes: int | str | None, adm_in_channels: int | None, dim: int) -> nn.Module | None:
    if num_classes is None:
        return None
    if isinstance(num_classes, int) and num_classes > 0:
        return LabelEmbedder(num_classes, dim)
    if num_classes == "sequential" and adm_in_channels:
        return VectorEmbedder(adm_in_channels, dim)
    raise ValueError(
        f"DiT: num_classes={num_classes!r} with adm_in_channels={adm_in_channels} must be None, an int, or "
        "'sequential' with adm_in_channels"
    )


class DiTBlock(nn.Module):
    """Self-attention, attention to the context where there is one, mlp; the first and the last modulated and
    gated by the conditioning vector (adaLN-Zero: Peebles & Xie 2022, figure 3).

    The context enters ungated after the self-attention, as in PixArt-alpha (https://arxiv.org/abs/2310.00426).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        context_dim: int | None,
        norm: str,
        mlp: str,
        qk_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = _norm(norm, dim)
        self.attn = ViTAttention(dim, num_heads, True, norm if qk_norm else None, dropout, dropout)
        self.norm2 = _norm(norm, dim)
        if mlp == "swiglu":
            # Two thirds of the width, for three matrices instead of two: the same number of parameters.
            self.mlp = SwiGLU(dim, int(2 / 3 * hidden), dropout)
        else:
            self.mlp = Mlp(dim, hidden, dropout, approximate="tanh")
        self.adaLN_modulation = _modulation(dim, 6)
        self.cross_attn = None
        if context_dim is not None:
            self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
            self.cross_attn = ContextAttention(dim, context_dim, num_heads, dropout=dropout)

    def forward(
        self, x: Tensor, c: Tensor, context: Tensor | None = None, rotary: Tensor | None = None
    ) -> Tensor:
        """x (B, N, dim), c (B, dim), context (B, M, context_dim) -> (B, N, dim).

        `rotary` as in `ViTAttention`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rotary)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm_cross(x), context)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm and linear map to the pixels of each patch."""

    def __init__(self, dim: int, out_features: int, norm: str) -> None:
        super().__init__()
        self.norm_final = _norm(norm, dim)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = _modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, dim), c (B, dim) -> (B, N, out_features)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


@remembers_arguments
class DiT(nn.Module):
    """Predicts, from a noisy sample and its time, what the denoiser asks for; called as `UNetModel` is.

    `size` names a published network, whose numbers hold where `patch_size`, `hidden_size`, `depth` and
    `num_heads` are None; without it, these must be given.

    A published DiT is `DiT("DiT-XL/2", num_classes=1000, learn_sigma=True)` in the latents of Stable
    Diffusion's autoencoder (latent_scale 0.18215), with `Denoiser(DiscreteSchedule("sqrt_linear"),
    learned_variance=True)`; a published SiT has `convention="sit"` and `Denoiser(FlowSchedule(), "flow")`.

    Args:
        size: a key of `DIT_SIZES`, or None.
        input_size: of `x`, an int or (H, W). Other sizes are taken too: their positions are laid over the
            range of this one's.
        in_channels, out_channels: of `x` and of the prediction, which None keeps alike.
        patch_size, hidden_size, depth, num_heads: side of a patch, channels, blocks, and heads of each.
        mlp_ratio: inner width of the mlp over `hidden_size`.
        num_classes: how `y` enters, added to the time embedding. An int: class numbers, embedded;
            "sequential": a vector of `adm_in_channels`, through a small network. None: there is no `y`.
        adm_in_channels: length of the vector for "sequential".
        context_dim: channels of the context tokens; None: there is no context.
        context_mode: "cross-attention" of each block to the context, or "tokens": the context, through a
            linear layer, stands in the sequence beside the patches (in-context conditioning).
        learn_sigma: predict as many channels again, for the variance.
        positions: "sincos" (added once, fixed), "rotary" (in each attention), or "both".
        norm: "layer", or "rms" (without mean and shift, with a weight).
        mlp: "gelu" or "swiglu".
        qk_norm: the norm over each head's queries and keys too.
        num_registers: learned tokens beside the patches, free for the network's use (Darcet et al. 2023,
            https://arxiv.org/abs/2309.16588).
        in_context_tokens: copies of the conditioning vector (time plus `y`) that stand in the sequence, each
            with a learned offset (Peebles & Xie 2022, section 3.2; several copies as in Li & He 2025,
            https://arxiv.org/abs/2511.13720).
        in_context_start: index of the block before which they join.
        dropout: of attention weights and of the outputs of attention and mlp.
        convention: "dit": `timesteps` go in, and the prediction comes out, as they are. "sit": for weights
            trained on SiT's interpolant, whose t runs from 0 at noise to 1 at data and which predict
            data - noise. `timesteps` and the result are those of the toolkit's flow models all the same
            (1000 at noise; noise - data), and `learn_sigma`'s half, which SiT never trained, is left out.
        use_checkpoint: recompute each block in the backward pass (less memory, more time).

    Raises:
        ValueError: unknown names, a number missing without a size, sizes that do not divide.
    """

    def __init__(
        self,
        size: str | None = None,
        *,
        input_size: Size = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch_size: Size | None = None,
        hidden_size: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int | str | None = None,
        adm_in_channels: int | None = None,
        context_dim: int | None = None,
        context_mode: str = "cross-attention",
        learn_sigma: bool = False,
        positions: str = "sincos",
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
        num_registers: int = 0,
        in_context_tokens: int = 0,
        in_context_start: int = 0,
        dropout: float = 0.0,
        convention: str = "dit",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        given = dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        numbers = published_numbers("DiT", size, DIT_SIZES, **given)
        dim, depth, num_heads = numbers["hidden_size"], numbers["depth"], numbers["num_heads"]
        check_choice("DiT: positions", positions, ("sincos", "rotary", "both"))
        check_choice("DiT: norm", norm, ("layer", "rms"))
        check_choice("DiT: mlp", mlp, ("gelu", "swiglu"))
        check_choice("DiT: context_mode", context_mode, ("cross-attention", "tokens"))
        check_choice("DiT: convention", convention, ("dit", "sit"))
        if not 0 <= in_context_start < max(depth, 1):
            raise ValueError(f"DiT: in_context_start={in_context_start} is none of the {depth} blocks")
        channels = in_channels if out_channels is None else out_channels
        predicted = 2 * channels if learn_sigma else channels
        self.in_channels = in_channels
        self.out_channels = channels if convention == "sit" else predicted
        self.num_classes, self.adm_in_channels, self.context_dim = num_classes, adm_in_channels, context_dim
        self.convention, self.in_context_start = convention, in_context_start
        self.use_checkpoint = use_checkpoint

        self.x_embedder = PatchEmbed(numbers["patch_size"], in_channels, dim)
        self.grid_size = self.x_embedder.grid(*as_pair(input_size, "input_size"))
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = _label_embedder(num_classes, adm_in_channels, dim)
        # Fixed, so a buffer; it stands in DiT's weights all the same.
        sincos = sincos_positions(dim, self.grid_size)[None] if positions != "rotary" else None
        self.register_buffer("pos_embed", sincos)
        self.registers = nn.Parameter(torch.empty(1, num_registers, dim)) if num_registers else None
        self.in_context = nn.Parameter(torch.empty(1, in_context_tokens, dim)) if in_context_tokens else None
        tokens_mode = context_dim is not None and context_mode == "tokens"
        self.context_embedder = nn.Linear(context_dim, dim) if tokens_mode else None
        cross_dim = None if tokens_mode else context_dim
        self.blocks = nn.ModuleList(
            DiTBlock(dim, num_heads, mlp_ratio, cross_dim, norm, mlp, qk_norm, dropout) for _ in range(depth)
        )
        self.final_layer = FinalLayer(dim, math.prod(self.x_embedder.patch_size) * predicted, norm)
        self.rotary_dim = dim // num_heads if positions != "sincos" else None
        self._rotary(self.grid_size, 0)  # a width that has no rotary positions is an error here, not later
        self._initialize()

    def _initialize(self) -> None:
        """As in DiT's repository: Xavier for matrices, normal(0, 0.02) for embeddings, zero for what ends a
        residual branch or the network."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        small = [layer.weight for layer in self.t_embedder.mlp[::2]] + [self.registers, self.in_context]
        if isinstance(self.y_embedder, LabelEmbedder):
            small.append(self.y_embedder.embedding_table.weight)
        for parameter in small:
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            zero_module(block.adaLN_modulation[-1])
            if block.cross_attn is not None:
                zero_module(block.cross_attn.out_proj)
        zero_module(self.final_layer.adaLN_modulation[-1])
        zero_module(self.final_layer.linear)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The raw prediction at a noisy sample.

        Args:
            x: (B, in_channels, H, W), H and W multiples of the patch size.
            timesteps: (B,) times, whole or fractional, in the units of training (usually [0, 1000)).
            context: (B, M, context_dim) conditioning tokens, if and only if the network has a `context_dim`.
            y: if and only if `num_classes` is set: (B,) int64 class numbers, of which `num_classes` and -1
                mean none; (B, adm_in_channels) for "sequential".

        Returns (B, out_channels, H, W).

        Raises:
            ValueError: a shape that does not fit, or `y` or `context` missing or out of place.
        """
        check_inputs(self, len(x), timesteps, context, y)
        grid = self.x_embedder.grid(*x.shape[2:])
        c = self.t_embedder(1 - timesteps / 1000 if self.convention == "sit" else timesteps)  # (B, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        tokens = self.x_embedder(x)  # (B, h w, D)
        if self.pos_embed is not None:
            tokens = tokens + self._sincos(grid).to(tokens.dtype)
        prefix = [] if self.registers is None else [self.registers.expand(len(x), -1, -1)]
        if self.context_embedder is not None:
            prefix.append(self.context_embedder(context))
        h = torch.cat([*prefix, tokens], dim=1)
        rotary = self._rotary(grid, h.shape[1] - tokens.shape[1], x.device)
        cross = context if self.context_embedder is None else None
        for index, block in enumerate(self.blocks):
            if self.in_context is not None and index == self.in_context_start:
                h = torch.cat([c[:, None] + self.in_context, h], dim=1)
                rotary = self._rotary(grid, h.shape[1] - tokens.shape[1], x.device)
            h = checkpoint(block, (h, c, cross, rotary), self.use_checkpoint)
        h = self.final_layer(h[:, -tokens.shape[1] :], c)
        out = unpatchify(h, grid, self.x_embedder.patch_size)
        return -out[:, : self.out_channels] if self.convention == "sit" else out

    def _sincos(self, grid: tuple[int, int]) -> Tensor:
        """(1, h w, D)."""
        if grid == self.grid_size:
            return self.pos_embed
        dim = self.pos_embed.shape[-1]
        return sincos_positions(dim, grid, self.grid_size)[None].to(self.pos_embed.device)

    def _rotary(
        self, grid: tuple[int, int], prefix: int, device: torch.device | None = None
    ) -> Tensor | None:
        """(2, prefix + h w, head_dim / 2), without a turn for the tokens before the patches; None without."""
        if self.rotary_dim is None:
            return None
        cos, sin = rotary_positions(self.rotary_dim, grid, self.grid_size, device=device)
        return torch.stack([F.pad(cos, (0, 0, prefix, 0), value=1.0), F.pad(sin, (0, 0, prefix, 0))])
