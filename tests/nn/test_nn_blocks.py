"""The blocks of ldm.nn against their formulas, written out in float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from reference_data import filled_state_dict, noise, relative_error
from torch import nn

from ldm.nn.attention import (
    ATTENTION_BUILDERS,
    AttentionBlock,
    AttnBlock,
    CrossAttention,
    LinAttnBlock,
    LinearAttention,
    QKVAttention,
    make_attn,
)
from ldm.nn.checkpoint import checkpoint
from ldm.nn.init import avg_pool_nd, conv_nd, zero_module
from ldm.nn.resblock import (
    Downsample,
    DownsampleND,
    ResBlock,
    TimestepResBlock,
    Upsample,
    UpsampleND,
    normalize,
)
from ldm.nn.timestep import ContextBlock, TimestepBlock, TimestepEmbedSequential, timestep_embedding
from ldm.nn.transformer import GEGLU, BasicTransformerBlock, FeedForward, SpatialTransformer


def fill(module: nn.Module) -> nn.Module:
    """Weights by name, none of them zero, in float64."""
    module.load_state_dict(filled_state_dict({k: v.shape for k, v in module.state_dict().items()}))
    return module.double().eval()


def randn(name: str, *shape: int) -> torch.Tensor:
    return noise(name, *shape).double()


def softmax_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v, one query at a time; q, k, v (N, d), (M, d), (M, e)."""
    rows = []
    for i in range(len(q)):
        scores = torch.stack([(q[i] * k[j]).sum() / math.sqrt(q.shape[1]) for j in range(len(k))])
        if mask is not None:
            scores = scores.masked_fill(~mask[i], -math.inf)
        weights = scores.exp() / scores.exp().sum()
        rows.append((weights[:, None] * v).sum(0))
    return torch.stack(rows)


def close(actual, expected, tolerance=1e-12):
    assert relative_error(actual, expected) < tolerance


def assert_every_parameter_learns(module: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


# --- norms, convolutions, zero initialisation


def test_normalize_names_the_divisors():
    with pytest.raises(
        ValueError, match=r"num_groups=32 does not divide 48 channels.*1, 2, 3, 4, 6, 8, 12, 16"
    ):
        normalize(48)
    with pytest.raises(ValueError, match="num_groups=0"):
        normalize(48, 0)
    norm = normalize(48, 16)
    assert (norm.num_groups, norm.eps, norm.affine) == (16, 1e-6, True)


def test_dimensions_other_than_1_2_3_are_refused():
    for make in (conv_nd, avg_pool_nd):
        with pytest.raises(ValueError, match="dims is 4.*1, 2, 3"):
            make(4, 2)


def test_zero_module():
    assert all(not p.any() for p in zero_module(nn.Conv2d(2, 3, 3)).parameters())


# --- the autoencoder's blocks


@pytest.mark.parametrize("shortcut", ["identity", "nin", "conv"])
def test_resblock_formula(shortcut):
    out_channels = 6 if shortcut == "identity" else 9
    block = fill(ResBlock(6, out_channels, conv_shortcut=shortcut == "conv", num_groups=3, temb_channels=5))
    x, temb = randn("x", 2, 6, 7, 4), randn("temb", 2, 5)
    p = dict(block.named_parameters())
    h = F.silu(F.group_norm(x, 3, p["norm1.weight"], p["norm1.bias"], 1e-6))
    h = F.conv2d(h, p["conv1.weight"], p["conv1.bias"], padding=1)
    h = h + (F.silu(temb) @ p["temb_proj.weight"].T + p["temb_proj.bias"])[:, :, None, None]
    h = F.silu(F.group_norm(h, 3, p["norm2.weight"], p["norm2.bias"], 1e-6))
    h = F.conv2d(h, p["conv2.weight"], p["conv2.bias"], padding=1)
    if shortcut == "nin":
        x = F.conv2d(x, p["nin_shortcut.weight"], p["nin_shortcut.bias"])
    elif shortcut == "conv":
        x = F.conv2d(x, p["conv_shortcut.weight"], p["conv_shortcut.bias"], padding=1)
    output = block(randn("x", 2, 6, 7, 4), temb)
    close(output, x + h)
    assert_every_parameter_learns(block, output.square().sum())


def test_resblock_says_when_the_embedding_does_not_fit():
    x = randn("x", 1, 4, 3, 3).float()
    with pytest.raises(ValueError, match="temb is given with shape"):
        ResBlock(4, num_groups=2)(x, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="temb is missing"):
        ResBlock(4, num_groups=2, temb_channels=5)(x)
    assert not any("temb" in name for name, _ in ResBlock(4, num_groups=2).named_parameters())


def test_resblock_dropout_only_in_training():
    torch.manual_seed(0)
    block, x = ResBlock(4, num_groups=2, dropout=0.5), torch.randn(1, 4, 5, 5)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("size", [(6, 4), (7, 5)])
def test_downsample_pads_right_and_bottom(size):
    block, x = fill(Downsample(3)), randn("x", 2, 3, *size)
    padded = torch.zeros(2, 3, size[0] + 1, size[1] + 1, dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = x
    close(block(x), F.conv2d(padded, block.conv.weight, block.conv.bias, stride=2))
    assert block(x).shape[2:] == (size[0] // 2, size[1] // 2)


def test_resampling_without_convolution():
    x = randn("x", 2, 3, 4, 6)
    up = Upsample(3, with_conv=False)(x)
    close(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    close(Downsample(3, with_conv=False)(up), x)
    assert not list(Upsample(3, with_conv=False).parameters())


def test_upsample_formula():
    block, x = fill(Upsample(3)), randn("x", 2, 3, 4, 6)
    expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    close(block(x), F.conv2d(expected, block.conv.weight, block.conv.bias, padding=1))


# --- attention over feature maps


@pytest.mark.parametrize("channels, groups, size", [(8, 4, (3, 5)), (5, 5, (4, 2)), (7, 1, (1, 1))])
def test_attn_block_formula(channels, groups, size):
    block, x = fill(AttnBlock(channels, groups)), randn("x", 2, channels, *size)
    h = F.group_norm(x, groups, block.norm.weight, block.norm.bias, 1e-6).flatten(2).transpose(1, 2)
    q, k, v = (h @ c.weight[:, :, 0, 0].T + c.bias for c in (block.q, block.k, block.v))  # (B, HW, C)
    out = torch.stack([softmax_attention(*one) for one in zip(q, k, v, strict=True)])
    out = out @ block.proj_out.weight[:, :, 0, 0].T + block.proj_out.bias
    close(block(x), x + out.transpose(1, 2).reshape(x.shape))


def test_attn_block_layout_and_gradients():
    block, x = fill(AttnBlock(8, 4)), randn("x", 2, 8, 3, 5)
    close(block(x.to(memory_format=torch.channels_last)), block(x))
    # The keys' bias shifts all scores of a query alike, so its gradient vanishes by symmetry.
    block.k.bias.requires_grad_(False)
    loss = block(x).square().sum()
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in block.parameters() if p.requires_grad)


@pytest.mark.parametrize("heads, dim_head, size", [(1, 6, (3, 5)), (2, 5, (2, 4)), (3, 1, (1, 1))])
def test_linear_attention_formula(heads, dim_head, size):
    block, x = fill(LinearAttention(6, heads, dim_head)), randn("x", 2, 6, *size)
    qkv = torch.einsum("oc,bchw->bohw", block.to_qkv.weight[:, :, 0, 0], x).flatten(2)
    q, k, v = qkv.reshape(2, 3, heads, dim_head, -1).unbind(1)  # (B, heads, d, N)
    out = torch.zeros_like(q)
    for b in range(2):
        for h in range(heads):
            weights = k[b, h].exp() / k[b, h].exp().sum(1, keepdim=True)  # over positions
            context = sum(torch.outer(weights[:, n], v[b, h, :, n]) for n in range(q.shape[-1]))
            for n in range(q.shape[-1]):
                out[b, h, :, n] = context.T @ q[b, h, :, n]
    out = out.reshape(2, heads * dim_head, *size)
    expected = torch.einsum("oc,bchw->bohw", block.to_out.weight[:, :, 0, 0], out)
    close(block(x), expected + block.to_out.bias[:, None, None])
    if size != (1, 1):  # The softmax over a single position is constant: its key learns nothing.
        assert_every_parameter_learns(block, block(x).square().sum())


def test_lin_attn_block_is_linear_attention_with_one_head():
    block, plain = fill(LinAttnBlock(6)), fill(LinearAttention(6, heads=1, dim_head=6))
    assert list(block.state_dict()) == ["to_qkv.weight", "to_out.weight", "to_out.bias"]
    x = randn("x", 2, 6, 3, 5)
    assert torch.equal(block(x), plain(x))


def test_make_attn(monkeypatch):
    assert isinstance(make_attn(8, num_groups=4), AttnBlock)
    assert isinstance(make_attn(7, "linear"), LinAttnBlock)  # no norm: any number of channels
    assert isinstance(make_attn(7, "none"), nn.Identity)
    assert make_attn(8, "vanilla", 4).norm.num_groups == 4
    with pytest.raises(ValueError, match="attn_type is 'quadratic'.*vanilla.*linear.*none"):
        make_attn(8, "quadratic")
    with pytest.raises(ValueError, match="allowed: 1, 2, 4, 8"):
        make_attn(8)
    monkeypatch.setitem(ATTENTION_BUILDERS, "se", lambda channels: nn.Conv2d(channels, channels, 1))
    assert isinstance(make_attn(3, "se"), nn.Conv2d)


# --- the UNet's attention


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("length", [1, 6])
def test_qkv_attention_formula(new_order, length):
    heads, d = 3, 4
    qkv = randn("qkv", 2, 3 * heads * d, length)
    out = QKVAttention(heads, new_order)(qkv)
    assert out.shape == (2, heads * d, length)
    for b in range(2):
        for h in range(heads):
            # Rows of q, k, v of this head among the 3 heads d channels.
            starts = (
                [i * heads * d + h * d for i in range(3)]
                if new_order
                else [(3 * h + i) * d for i in range(3)]
            )
            q, k, v = (qkv[b, s : s + d].T for s in starts)
            close(out[b, h * d : (h + 1) * d].T, softmax_attention(q, k, v))


@pytest.mark.parametrize("spatial", [(7,), (3, 5), (2, 3, 2), (1, 1)])
@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block_formula(spatial, new_order):
    block = fill(AttentionBlock(6, num_heads=2, use_new_attention_order=new_order, num_groups=3))
    x = randn("x", 2, 6, *spatial)
    h = F.group_norm(x, 3, block.norm.weight, block.norm.bias, 1e-5).flatten(2)
    qkv = torch.einsum("oc,bct->bot", block.qkv.weight[:, :, 0], h) + block.qkv.bias[:, None]
    out = QKVAttention(2, new_order)(qkv)
    out = torch.einsum("oc,bct->bot", block.proj_out.weight[:, :, 0], out) + block.proj_out.bias[:, None]
    close(block(x), x + out.reshape(x.shape))


@pytest.mark.parametrize("heads", [1, 7])
@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block_of_an_odd_width_is_softmax_attention(heads, new_order):
    """From the norm to the residual without any of our attention: each head's rows of q, k, v by hand."""
    block = fill(AttentionBlock(7, num_heads=heads, use_new_attention_order=new_order, num_groups=1))
    x, d = randn("x", 2, 7, 3, 5), 7 // heads
    h = F.group_norm(x, 1, block.norm.weight, block.norm.bias, 1e-5).flatten(2)
    qkv = F.conv1d(h, block.qkv.weight, block.qkv.bias)
    parts = []
    for head in range(heads):
        rows = [i * 7 + head * d if new_order else (3 * head + i) * d for i in range(3)]
        q, k, v = (qkv[:, row : row + d].transpose(1, 2) for row in rows)
        parts.append(torch.stack([softmax_attention(*one).T for one in zip(q, k, v, strict=True)]))
    out = F.conv1d(torch.cat(parts, dim=1), block.proj_out.weight, block.proj_out.bias)
    close(block(x), x + out.reshape(x.shape))


def test_attention_block_starts_as_identity_and_counts_heads():
    x = torch.randn(1, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(AttentionBlock(8, num_groups=4)(x), x)
    assert AttentionBlock(8, num_heads=3, num_head_channels=2, num_groups=4).attention.num_heads == 4
    with pytest.raises(ValueError, match="num_heads=3 does not divide 8"):
        AttentionBlock(8, num_heads=3, num_groups=4)
    with pytest.raises(ValueError, match="num_head_channels=5 does not divide 8"):
        AttentionBlock(8, num_head_channels=5, num_groups=4)


def cross_attention_formula(block, x, context, mask=None):
    q, k, v = x @ block.to_q.weight.T, context @ block.to_k.weight.T, context @ block.to_v.weight.T
    d = q.shape[-1] // block.heads
    out = torch.cat(
        [
            torch.stack(
                [
                    softmax_attention(
                        *(t[b, :, h * d : (h + 1) * d] for t in (q, k, v)), None if mask is None else mask[b]
                    )
                    for b in range(len(x))
                ]
            )
            for h in range(block.heads)
        ],
        dim=-1,
    )
    return out @ block.to_out[0].weight.T + block.to_out[0].bias


@pytest.mark.parametrize("queries, keys", [(5, 3), (1, 4), (4, 1)])
def test_cross_attention_formula(queries, keys):
    block = fill(CrossAttention(6, context_dim=5, heads=2, dim_head=4))
    x, context = randn("x", 2, queries, 6), randn("context", 2, keys, 5)
    close(block(x, context), cross_attention_formula(block, x, context))


def test_self_attention_formula():
    block, x = fill(CrossAttention(6, heads=3, dim_head=2)), randn("x", 2, 4, 6)
    close(block(x), cross_attention_formula(block, x, x))
    assert_every_parameter_learns(block, block(x).square().sum())


@pytest.mark.parametrize("per_query", [False, True])
def test_cross_attention_mask(per_query):
    block = fill(CrossAttention(6, context_dim=5, heads=2, dim_head=4))
    x, context = randn("x", 2, 3, 6), randn("context", 2, 4, 5)
    mask = (
        randn("mask", 2, 3, 4) > 0
        if per_query
        else torch.tensor([[True, False, True, True], [False, True, True, False]])
    )
    if per_query:
        mask[..., 0] = True
    full = mask if per_query else mask[:, None].expand(2, 3, 4)
    close(block(x, context, mask), cross_attention_formula(block, x, context, full))
    if not per_query:  # What is masked has no influence.
        close(block(x, torch.where(mask[..., None], context, 100.0), mask), block(x, context, mask))


def test_cross_attention_refuses_other_masks():
    block = CrossAttention(6, heads=2, dim_head=4)
    x = torch.zeros(2, 3, 6)
    with pytest.raises(ValueError, match="torch.float32"):
        block(x, mask=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 4\); expected one of \(2, 3\), \(2, 3, 3\)"):
        block(x, mask=torch.ones(2, 4, dtype=torch.bool))


# --- transformers


def test_feed_forward_formulas():
    x = randn("x", 2, 3, 4)
    geglu = fill(GEGLU(4, 5))
    a, b = (x @ geglu.proj.weight.T + geglu.proj.bias).split(5, dim=-1)
    close(geglu(x), a * b * 0.5 * (1 + torch.erf(b / math.sqrt(2))))
    ff = fill(FeedForward(4, dim_out=6, mult=3))
    h = x @ ff.net[0][0].weight.T + ff.net[0][0].bias
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    close(ff(x), h @ ff.net[2].weight.T + ff.net[2].bias)
    assert ff.net[0][0].out_features == 12


@pytest.mark.parametrize("disable_self_attn", [False, True])
def test_transformer_block_formula(disable_self_attn):
    block = fill(BasicTransformerBlock(6, 2, 3, context_dim=5, disable_self_attn=disable_self_attn))
    x, context = randn("x", 2, 4, 6), randn("context", 2, 3, 5)
    h = x + block.attn1(block.norm1(x), context if disable_self_attn else None)
    h = h + block.attn2(block.norm2(h), context)
    close(block(x, context), h + block.ff(block.norm3(h)))
    assert block.attn1.to_k.in_features == (5 if disable_self_attn else 6)
    assert_every_parameter_learns(block, block(x, context).square().sum())


@pytest.mark.parametrize("spatial", [(3, 5), (1, 1), (7,), (2, 3, 2)])
def test_spatial_transformer_projections_agree(spatial):
    """1x1 convolutions and linear layers with the same numbers are the same map, in 1, 2 and 3 dimensions."""
    dims = len(spatial)
    conv = fill(SpatialTransformer(6, 2, 4, depth=2, context_dim=5, dims=dims, num_groups=3))
    linear = (
        SpatialTransformer(6, 2, 4, depth=2, context_dim=5, use_linear=True, num_groups=3).double().eval()
    )
    weights = conv.state_dict()
    for name in ("proj_in.weight", "proj_out.weight"):
        weights[name] = weights[name].flatten(1)
    linear.load_state_dict(weights)
    x, context = randn("x", 2, 6, *spatial), randn("context", 2, 3, 5)
    close(conv(x, context), linear(x, context))

    h = F.group_norm(x, 3, linear.norm.weight, linear.norm.bias, 1e-6).flatten(2).transpose(1, 2)
    h = linear.proj_in(h)
    for block in linear.transformer_blocks:
        h = block(h, context)
    close(linear(x, context), x + linear.proj_out(h).transpose(1, 2).reshape(x.shape))


def test_spatial_transformer_starts_as_identity():
    x, context = noise("x", 2, 8, 3, 5), noise("context", 2, 3, 5)
    for use_linear in (False, True):
        block = SpatialTransformer(8, 2, 4, context_dim=5, use_linear=use_linear, num_groups=4)
        assert torch.equal(block(x, context), x)


def test_spatial_transformer_depth_0_keeps_the_projections():
    block = fill(SpatialTransformer(6, 2, 3, depth=0, context_dim=[5], num_groups=3))
    assert {name.split(".")[0] for name in block.state_dict()} == {"norm", "proj_in", "proj_out"}
    x = randn("x", 2, 6, 3, 5)
    close(block(x, randn("context", 2, 3, 5)), x + block.proj_out(block.proj_in(block.norm(x))))


def test_spatial_transformer_contexts():
    block = fill(SpatialTransformer(6, 2, 3, depth=2, context_dim=[5, 4], num_groups=3))
    x, a, b = randn("x", 2, 6, 2, 3), randn("a", 2, 3, 5), randn("b", 2, 7, 4)
    assert [t.attn2.to_k.in_features for t in block.transformer_blocks] == [5, 4]
    assert not torch.equal(block(x, [a, b]), block(x, [a, b.flip(2)]))
    alike = fill(SpatialTransformer(6, 2, 3, depth=3, context_dim=[5], num_groups=3))
    assert torch.equal(alike(x, [a]), alike(x, a))
    assert torch.equal(alike(x, [a, a, a]), alike(x, a))
    with pytest.raises(ValueError, match="2 contexts given for 3 blocks"):
        alike(x, [a, a])
    with pytest.raises(ValueError, match=r"context_dim=\[5, 4\].*depth=3"):
        SpatialTransformer(6, 2, 3, depth=3, context_dim=[5, 4], num_groups=3)


# --- time


@given(t=st.floats(0, 1000), half=st.integers(1, 9), odd=st.booleans())
@settings(max_examples=50, deadline=None)
def test_timestep_embedding_closed_form(t, half, odd):
    embedding = timestep_embedding(torch.tensor([t], dtype=torch.float64), 2 * half + odd)[0]
    for i in range(half):
        angle = t * 10000 ** (-i / half)
        assert embedding[i].item() == pytest.approx(math.cos(angle), abs=1e-9)
        assert embedding[half + i].item() == pytest.approx(math.sin(angle), abs=1e-9)
    assert not odd or embedding[-1] == 0


@given(s=st.floats(0, 1000), t=st.floats(0, 1000), shift=st.floats(0, 1000))
@settings(max_examples=50, deadline=None)
def test_timestep_embedding_products_depend_on_differences(s, t, shift):
    times = torch.tensor([s, t, s + shift, t + shift], dtype=torch.float64)
    a, b, c, d = timestep_embedding(times, 16)
    assert (a @ b).item() == pytest.approx((c @ d).item(), abs=1e-9)


def test_timestep_embedding_types():
    whole = timestep_embedding(torch.tensor([0, 999]), 8)
    assert whole.dtype == torch.float32 and whole[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.equal(whole, timestep_embedding(torch.tensor([0.0, 999.0]), 8))
    assert timestep_embedding(torch.tensor([3.5], dtype=torch.bfloat16), 8).dtype == torch.float32
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        timestep_embedding(torch.zeros(2, 1), 8)
    with pytest.raises(ValueError, match="dim=1"):
        timestep_embedding(torch.zeros(2), 1)


def test_timestep_embed_sequential_hands_out_what_each_child_takes():
    class Emb(TimestepBlock):
        def forward(self, x, emb):
            return x + emb

    class Con(ContextBlock):
        def forward(self, x, context):
            return x * context

    layers = TimestepEmbedSequential(Emb(), nn.ReLU(), Con())
    x, emb, context = torch.tensor([-3.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([5.0, 5.0])
    assert layers(x, emb, context).tolist() == [0.0, 10.0]
    assert isinstance(TimestepResBlock(4, 3, num_groups=2), TimestepBlock)
    assert isinstance(SpatialTransformer(4, 1, 4, num_groups=2), ContextBlock)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_timestep_resblock_formula(scale_shift, resample):
    kwargs = {resample: True} if resample else {}
    block = fill(
        TimestepResBlock(6, 5, out_channels=9, use_scale_shift_norm=scale_shift, num_groups=3, **kwargs)
    )
    x, emb = randn("x", 2, 6, 4, 6), randn("emb", 2, 5)
    p = dict(block.named_parameters())

    def change(h):
        if resample == "up":
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.avg_pool2d(h, 2) if resample == "down" else h

    h = change(F.silu(F.group_norm(x, 3, p["in_layers.0.weight"], p["in_layers.0.bias"], 1e-5)))
    h = F.conv2d(h, p["in_layers.2.weight"], p["in_layers.2.bias"], padding=1)
    e = (F.silu(emb) @ p["emb_layers.1.weight"].T + p["emb_layers.1.bias"])[:, :, None, None]
    gamma, beta = p["out_layers.0.weight"], p["out_layers.0.bias"]
    if scale_shift:
        h = F.group_norm(h, 3, gamma, beta, 1e-5) * (1 + e[:, :9]) + e[:, 9:]
    else:
        h = F.group_norm(h + e, 3, gamma, beta, 1e-5)
    h = F.conv2d(F.silu(h), p["out_layers.3.weight"], p["out_layers.3.bias"], padding=1)
    skip = F.conv2d(change(x), p["skip_connection.weight"], p["skip_connection.bias"])
    close(block(x, emb), skip + h)
    assert_every_parameter_learns(block, block(x, emb).square().sum())


def test_timestep_resblock_starts_as_its_skip_connection():
    x, emb = noise("x", 2, 6, 4, 6), noise("emb", 2, 5)
    assert torch.equal(TimestepResBlock(6, 5, num_groups=3)(x, emb), x)
    wide = TimestepResBlock(6, 5, out_channels=8, use_conv=True, num_groups=2)
    assert wide.skip_connection.kernel_size == (3, 3)
    assert torch.equal(wide(x, emb), wide.skip_connection(x))
    with pytest.raises(ValueError, match="up and down"):
        TimestepResBlock(6, 5, up=True, down=True, num_groups=3)


@pytest.mark.parametrize(
    "dims, before, doubled", [(1, (4,), (8,)), (2, (4, 6), (8, 12)), (3, (3, 4, 6), (3, 8, 12))]
)
@pytest.mark.parametrize("use_conv", [False, True])
def test_resampling_in_1_2_and_3_dimensions(dims, before, doubled, use_conv):
    x = noise("x", 2, 3, *before)
    up, down = UpsampleND(3, use_conv, dims), DownsampleND(3, use_conv, dims)
    assert up(x).shape[2:] == doubled
    assert down(up(x)).shape[2:] == before
    if use_conv:
        assert UpsampleND(3, True, dims, out_channels=5)(x).shape[1] == 5
        assert [n for n, _ in up.named_parameters()] == ["conv.weight", "conv.bias"]
        assert [n for n, _ in down.named_parameters()] == ["op.weight", "op.bias"]
    else:
        assert torch.allclose(down(up(x)), x)
        with pytest.raises(ValueError, match="3 -> 5 channels needs use_conv"):
            DownsampleND(3, False, dims, out_channels=5)


# --- checkpointing


def gradients(module, inputs, autocast):
    """Loss, and gradients of all parameters and of the first input, from a fixed random state."""
    torch.manual_seed(0)
    module.zero_grad()
    x = inputs[0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(x, *inputs[1:]).float().square().mean()
    torch.rand(7)  # Something else draws before the backward pass.
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["res", "attention", "transformer"])
def test_checkpointed_blocks_have_the_same_gradients(kind, autocast):
    make, inputs = {
        "res": (
            lambda flag: TimestepResBlock(8, 6, dropout=0.3, num_groups=4, use_checkpoint=flag),
            (noise("x", 2, 8, 4, 6), noise("emb", 2, 6)),
        ),
        "attention": (
            lambda flag: AttentionBlock(8, 2, num_groups=4, use_checkpoint=flag),
            (noise("x", 2, 8, 4, 6),),
        ),
        "transformer": (
            lambda flag: BasicTransformerBlock(8, 2, 4, dropout=0.3, context_dim=6, use_checkpoint=flag),
            (noise("x", 2, 5, 8), noise("context", 2, 3, 6)),
        ),
    }[kind]
    plain, checkpointed = make(False), make(True)
    for module in (plain, checkpointed):
        fill(module).float().train()
    expected = gradients(plain, inputs, autocast)
    actual = gradients(checkpointed, inputs, autocast)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_checkpoint_runs_twice_only_when_it_helps():
    calls = []

    def double(x, nothing):
        calls.append(nothing)
        return (2 * x).exp()

    x = torch.ones(3, requires_grad=True)
    checkpoint(double, (x, None), True).sum().backward()
    assert len(calls) == 2
    assert torch.allclose(x.grad, 2 * torch.full((3,), 2.0).exp())
    calls.clear()
    checkpoint(double, (x, None), False).sum().backward()
    with torch.no_grad():
        checkpoint(double, (x, None), True)
    assert calls == [None, None]
