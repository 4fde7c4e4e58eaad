import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import filled, load_cases, load_config, load_keys, relative_error

from ldm.nn.patch import rotary_positions
from ldm.nn.sequence_attention import (
    ContextAttention,
    FusedSelfAttention,
    MultiHeadAttention,
    RMSNorm,
    SelfAttention,
    ViTAttention,
    attend,
    rotate,
)


def written_out(q, k, v, allowed=None):
    """softmax(q k^T / sqrt(d)) v for each head; q, k, v (B, heads, N, d) -> (B, N, heads * d)."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.cat(list((weights @ v).unbind(1)), dim=-1)


def heads_of(x, heads):
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def random_mask(*shape):
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = True  # every query has a key
    return mask


def fill(layer, keys, prefix=""):
    names = {name.removeprefix(prefix): shape for name, shape in keys.items() if name.startswith(prefix)}
    assert {name: list(p.shape) for name, p in layer.state_dict().items()} == names
    layer.load_state_dict({name: filled(name, tuple(shape)) for name, shape in names.items()})
    return layer


@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("self_attention", lambda: SelfAttention(32, dim_key=12, dim_value=20)),
        ("multi_head_attention", lambda: MultiHeadAttention(32, heads=4)),
        ("multi_head_attention_masked", lambda: MultiHeadAttention(32, heads=4)),
    ],
)
def test_variants_equal_the_reference(case, make):
    cases = load_cases("attention-variants")
    layer = fill(make(), load_keys("attention-variants")[case])
    options = {"mask": cases[f"{case}.input1"]} if f"{case}.input1" in cases else {}
    assert relative_error(layer(cases[f"{case}.input0"], **options), cases[f"{case}.output"]) < 1e-5


def test_stable_diffusion_attention_equals_the_reference():
    config, cases, keys = (load("sd-attention") for load in (load_config, load_cases, load_keys))
    own = fill(FusedSelfAttention(config["d_embed"], config["heads"]), keys, "self.")
    cross = fill(ContextAttention(config["d_embed"], config["d_cross"], config["heads"]), keys, "cross.")
    query = cases["query"]
    assert relative_error(own(query), cases["self_attention"]) < 1e-5
    assert relative_error(own(query, causal=True), cases["self_attention_causal"]) < 1e-5
    assert relative_error(cross(query, cases["context"]), cases["cross_attention"]) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    queries=st.integers(1, 7),
    keys=st.integers(1, 7),
    dim_key=st.integers(1, 5),
    dim_value=st.integers(1, 5),
    kind=st.sampled_from(["none", "keys", "pairs", "one head", "heads"]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attend_is_the_formula(heads, queries, keys, dim_key, dim_value, kind, causal, seed):
    torch.manual_seed(seed)
    q = torch.randn(2, heads, queries, dim_key).double()
    k = torch.randn(2, heads, keys, dim_key).double()
    v = torch.randn(2, heads, keys, dim_value).double()
    shape = {
        "keys": (2, keys),
        "pairs": (2, queries, keys),
        "one head": (2, 1, queries, keys),
        "heads": (2, heads, queries, keys),
    }.get(kind)
    mask = None if shape is None else random_mask(*shape)
    if mask is None:
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    else:
        allowed = {2: lambda m: m[:, None, None], 3: lambda m: m[:, None], 4: lambda m: m}[mask.ndim](mask)
    if causal:
        allowed = allowed & torch.tensor([[j <= i for j in range(keys)] for i in range(queries)])
    assert torch.allclose(attend(q, k, v, mask, causal=causal), written_out(q, k, v, allowed), atol=1e-10)


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_are_the_formula(length, masked):
    torch.manual_seed(0)
    x = torch.randn(2, length, 12).double()
    context = torch.randn(2, 5, 7).double()
    mask = random_mask(2, length, length) if masked else None
    allowed = None if mask is None else mask[:, None]

    own = SelfAttention(12, 3, 5).double()
    expected = written_out(*(heads_of(linear(x), 1) for linear in (own.q, own.k, own.v)), allowed)
    assert torch.allclose(own(x, mask), expected, atol=1e-6)

    multi = MultiHeadAttention(12, 3).double()
    parts = (heads_of(linear(x), 3) for linear in (multi.W_q, multi.W_k, multi.W_v))
    assert torch.allclose(multi(x, mask=mask), multi.W_o(written_out(*parts, allowed)), atol=1e-6)

    fused = FusedSelfAttention(12, 3).double()
    parts = [heads_of(part, 3) for part in fused.in_proj(x).split(12, dim=-1)]
    assert torch.allclose(fused(x, mask), fused.out_proj(written_out(*parts, allowed)), atol=1e-6)
    triangle = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    both = triangle if allowed is None else triangle & allowed
    both_mask = None if mask is None else mask | torch.eye(length, dtype=torch.bool)
    both = both | torch.eye(length, dtype=torch.bool)
    expected = fused.out_proj(written_out(*parts, both))
    assert torch.allclose(fused(x, both_mask, causal=True), expected, atol=1e-6)

    cross = ContextAttention(12, 7, 3).double()
    context_mask = random_mask(2, 5) if masked else None
    allowed_context = None if context_mask is None else context_mask[:, None, None]
    parts = (heads_of(p, 3) for p in (cross.q_proj(x), cross.k_proj(context), cross.v_proj(context)))
    expected = cross.out_proj(written_out(*parts, allowed_context))
    assert torch.allclose(cross(x, context, context_mask), expected, atol=1e-6)

    vit = ViTAttention(12, 3, qk_norm="layer").double()
    q, k, v = (heads_of(part, 3) for part in vit.qkv(x).split(12, dim=-1))
    expected = vit.proj(written_out(vit.q_norm(q), vit.k_norm(k), v, allowed))
    assert torch.allclose(vit(x, mask=mask), expected, atol=1e-6)


@pytest.mark.parametrize("length", [(1, 1), (2, 3)])
@pytest.mark.parametrize("qk_norm", [None, "layer", "rms"])
@pytest.mark.parametrize("masked", [False, True])
def test_vit_attention_with_rotary_positions_is_the_formula(length, qk_norm, masked):
    torch.manual_seed(0)
    count = math.prod(length)
    layer, x = ViTAttention(24, 3, qk_norm=qk_norm).double(), torch.randn(2, count, 24).double()
    rotary = rotary_positions(8, length).double()
    mask = random_mask(2, count, count) if masked else None
    q, k, v = (heads_of(part, 3) for part in layer.qkv(x).split(24, dim=-1))

    def turned(h):
        """Each pair of channels as a complex number, times exp(i angle)."""
        return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (4, 2))) * turns).flatten(-2)

    turns = torch.complex(*rotary)
    q, k = turned(layer.q_norm(q).contiguous()), turned(layer.k_norm(k).contiguous())
    expected = layer.proj(written_out(q, k, v, None if mask is None else mask[:, None]))
    assert torch.allclose(layer(x, rotary, mask), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(dtype, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 1] = False
    out = attend(q, k, v, mask, causal=causal)
    out.float().square().sum().backward()
    assert not out[0, 1].any() and out[0, 2:].any(-1).all() and out[1].any(-1).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v)) and not q.grad[0, :, 1].any()


COMPILED = {
    "self": (lambda: SelfAttention(12, 4, 5), {"mask"}),
    "multi-head": (lambda: MultiHeadAttention(12, 3), {"mask"}),
    "fused": (lambda: FusedSelfAttention(12, 3), {"mask", "causal"}),
    "context": (lambda: ContextAttention(12, 5, 3), {"context"}),
    "vit": (lambda: ViTAttention(12, 3, qk_norm="rms"), {"mask", "rotary"}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_layers_compile_whole(name):
    """No branch depends on values, so nothing breaks the graph."""
    torch.manual_seed(0)
    build, wanted = COMPILED[name]
    options = {
        "mask": random_mask(2, 6, 6), "causal": True, "context": torch.randn(2, 4, 5),
        "rotary": rotary_positions(4, (2, 3)),
    }  # fmt: skip
    layer, x = build(), torch.randn(2, 6, 12)
    options = {option: value for option, value in options.items() if option in wanted}
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, **options), layer(x, **options), atol=1e-6)


def test_heads_of_one_sequence_may_have_their_own_masks():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(8, 2).double(), torch.randn(3, 4, 8).double()
    mask = random_mask(3, 2, 4, 4)
    assert torch.equal(layer(x, mask=mask.flatten(0, 1).int()), layer(x, mask=mask))


def test_multi_head_attention_takes_other_keys_and_values():
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2)
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert torch.equal(layer(query, key), layer(query, key, key))
    assert not torch.allclose(layer(query, key), layer(query, key, value))
    assert layer(query, key, value, mask=random_mask(2, 5)).shape == (2, 3, 8)


def test_masked_keys_have_no_influence():
    torch.manual_seed(0)
    layer, x = ContextAttention(8, 6, 2), torch.randn(2, 3, 8)
    context, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 1]])
    changed = torch.where(mask[..., None].bool(), context, torch.full_like(context, 100.0))
    assert torch.allclose(layer(x, context, mask), layer(x, changed, mask), atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (MultiHeadAttention(8, 2, dropout=0.5), (8,)),
        (FusedSelfAttention(8, 2, dropout=0.5), (8,)),
        (ContextAttention(8, 6, 2, dropout=0.5), (8, 6)),
        (ViTAttention(8, 2, dropout=0.5), (8,)),
    ],
)
def test_dropout_acts_in_training_alone(layer, inputs):
    tensors = [torch.randn(2, 9, width) for width in inputs]
    layer.train()
    torch.manual_seed(0)
    first = layer(*tensors)
    assert not torch.allclose(first, layer(*tensors))
    torch.manual_seed(0)
    assert torch.equal(first, layer(*tensors))
    layer.eval()
    assert torch.equal(layer(*tensors), layer(*tensors))


@pytest.mark.parametrize(
    ("layer", "inputs", "deaf"),
    [
        (SelfAttention(9, 5, 7), (9,), {"k.bias"}),
        (MultiHeadAttention(9, 3), (9,), {"W_k.bias"}),
        (FusedSelfAttention(9, 3), (9,), set()),
        (ContextAttention(9, 5, 3), (9, 5), {"k_proj.bias"}),
        (ViTAttention(9, 3), (9,), set()),
        (ViTAttention(9, 3, qk_norm="layer"), (9,), {"k_norm.bias"}),
        (ViTAttention(9, 3, qk_norm="rms"), (9,), set()),
    ],
)
def test_every_parameter_receives_a_gradient(layer, inputs, deaf):
    """But for a bias of the keys, which shifts all logits of a query alike and so changes nothing."""
    torch.manual_seed(0)
    layer(*(torch.randn(2, 6, width) for width in inputs)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        size = parameter.grad.abs().max()
        assert size < 1e-4 if name in deaf else size > 1e-4, name


def test_rotation_makes_products_depend_on_distance_alone():
    torch.manual_seed(0)
    rotary = rotary_positions(8, (6, 7))
    q, k = torch.randn(8).expand(1, 1, 42, 8), torch.randn(8).expand(1, 1, 42, 8)
    products = (rotate(q, rotary) @ rotate(k, rotary).transpose(-1, -2))[0, 0].reshape(6, 7, 6, 7)
    assert torch.allclose(products[0, 0, 2, 3], products[3, 1, 5, 4], atol=1e-5)
    assert torch.allclose(products[4, 5, 2, 1], products[2, 6, 0, 2], atol=1e-5)
    assert not torch.allclose(products[0, 0, 2, 3], products[0, 0, 3, 2], atol=1e-3)
    assert torch.allclose(rotate(q, rotary).norm(dim=-1), q.norm(dim=-1), atol=1e-5)


def test_rotation_is_multiplication_of_complex_numbers():
    torch.manual_seed(0)
    angles, x = torch.randn(5, 3).double(), torch.randn(2, 4, 5, 6).double()
    turned = torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.exp(1j * angles)
    expected = torch.view_as_real(turned).flatten(-2)
    assert torch.allclose(rotate(x, torch.stack([angles.cos(), angles.sin()])), expected, atol=1e-12)


def test_rms_norm_is_its_formula():
    norm, x = RMSNorm(6), torch.randn(2, 3, 6)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.arange(6.0)
    assert torch.allclose(norm(x), expected, atol=1e-6)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_qk_norm_bounds_the_logits():
    torch.manual_seed(0)
    layer, x = ViTAttention(8, 2, qk_norm="rms"), torch.randn(2, 5, 8)
    with torch.no_grad():
        before = layer(x)
        layer.qkv.weight[:16] *= 1000
        layer.qkv.bias[:16] *= 1000
        assert torch.allclose(layer(x), before, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vit_attention_runs_in_half_precision(dtype):
    torch.manual_seed(0)
    x, rotary = torch.randn(1, 6, 8), rotary_positions(4, (2, 3))
    plain = ViTAttention(8, 2, qk_norm="layer")
    expected = plain(x, rotary)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(plain(x, rotary).float(), expected, atol=0.05)
    out = plain.to(dtype)(x.to(dtype), rotary)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), expected, atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHeadAttention(8, 3), "heads=3 does not divide 8"),
        (lambda: FusedSelfAttention(8, 0), "heads=0"),
        (lambda: ContextAttention(8, 4, 5), "heads=5"),
        (lambda: ViTAttention(8, 2, qk_norm="batch"), "None, layer, rms"),
        (lambda: SelfAttention(4)(torch.zeros(2, 3, 4), torch.ones(3, 3).bool()), r"one of \(2, 3\)"),
        (lambda: SelfAttention(4)(torch.zeros(2, 3, 4), torch.ones(2, 3)), "float32"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
