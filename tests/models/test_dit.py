import math

import pytest
import torch
from reference_data import filled, noise, relative_error
from torch.nn import functional as F

from ldm.models.dit import DIT_SIZES, DiT, DiTBlock
from ldm.nn.patch import rotary_positions, sincos_positions
from ldm.nn.timestep import timestep_embedding

TINY = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=4)
VARIANTS = {
    "unconditional": {},
    "class": {"num_classes": 10},
    "vector": {"num_classes": "sequential", "adm_in_channels": 7},
    "context": {"context_dim": 6},
    "context tokens": {"context_dim": 6, "context_mode": "tokens"},
    "class and context": {"num_classes": 10, "context_dim": 6},
    "rotary": {"positions": "rotary"},
    "both positions": {"positions": "both"},
    "modern": {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "qk_norm": True, "num_classes": 10},
    "layer qk norm": {"qk_norm": True},
    "registers": {"num_registers": 3, "positions": "rotary"},
    "in context": {"in_context_tokens": 2, "in_context_start": 1, "num_classes": 10, "positions": "rotary"},
    "learned sigma": {"learn_sigma": True, "num_classes": 10},
    "concat": {"in_channels": 7, "out_channels": 4},
    "sit": {"convention": "sit", "learn_sigma": True, "num_classes": 10},
    "everything": {
        "num_classes": 10,
        "context_dim": 6,
        "context_mode": "tokens",
        "num_registers": 2,
        "in_context_tokens": 2,
        "positions": "both",
        "norm": "rms",
        "mlp": "swiglu",
        "qk_norm": True,
        "learn_sigma": True,
    },
}


def tiny(**options):
    torch.manual_seed(0)
    return DiT(**{**TINY, **options})


def filled_model(**options):
    """Every parameter a fixed function of its name, so that nothing stays at its zero initialisation."""
    model = tiny(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(filled(name, tuple(parameter.shape)))
    return model


def inputs(model, batch=3, size=(8, 8)):
    torch.manual_seed(1)
    x, t = torch.randn(batch, model.in_channels, *size), torch.linspace(0, 999, batch)
    cond = {}
    if isinstance(model.num_classes, int):
        cond["y"] = torch.arange(batch) % model.num_classes
    elif model.num_classes == "sequential":
        cond["y"] = torch.randn(batch, model.adm_in_channels)
    if model.context_dim is not None:
        cond["context"] = torch.randn(batch, 5, model.context_dim)
    return x, t, cond


@pytest.mark.parametrize("variant", VARIANTS)
def test_starts_at_zero_and_every_parameter_receives_a_gradient(variant):
    fresh = tiny(**VARIANTS[variant])
    x, t, cond = inputs(fresh, batch=10)
    out = fresh(x, t, **cond)
    assert out.shape == (10, fresh.out_channels, 8, 8)
    assert not out.any()

    model = filled_model(**VARIANTS[variant])
    if "y" in cond and cond["y"].ndim == 1:
        x, t, cond = inputs(model, batch=11)
        cond["y"][-1] = -1  # the null row too
        cond["y"][:10] = torch.arange(10)
    model(x, t, **cond)[:, :, :, ::3].square().sum().backward()
    # A bias that all keys share shifts the logits of a query alike, so that it changes nothing.
    deaf = ("k_proj.bias", "k_norm.bias")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name.endswith(deaf) or parameter.grad.abs().max() > 1e-6, name
    if isinstance(model.num_classes, int):
        assert model.y_embedder.embedding_table.weight.grad.abs().amax(1).min() > 0


@pytest.mark.parametrize("variant", ["modern", "everything", "class and context", "in context"])
def test_checkpointing_changes_nothing(variant):
    gradients = []
    for use_checkpoint in (False, True):
        model = filled_model(**VARIANTS[variant], dropout=0.2, use_checkpoint=use_checkpoint).train()
        x, t, cond = inputs(model)
        torch.manual_seed(2)
        model(x, t, **cond).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def written_out(state, x, t, y, patch, heads, depth):
    """Peebles & Xie's network on a square input, from its equations and a state dict."""

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def chunks(name, n):
        return linear(f"{name}.adaLN_modulation.1", F.silu(c))[:, None].chunk(n, dim=-1)

    def gelu(h):
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    side, h = h.shape[-1], h.flatten(2).mT
    h = h + sincos_positions(h.shape[-1], (side, side)).to(h)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", timestep_embedding(t, 256).to(h))))
    c = time + state["y_embedder.embedding_table.weight"][y]
    for block in (f"blocks.{i}" for i in range(depth)):
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks(block, 6)
        qkv = linear(f"{block}.attn.qkv", norm(h) * (1 + scale1) + shift1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        h = h + gate1 * linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = gelu(linear(f"{block}.mlp.fc1", norm(h) * (1 + scale2) + shift2))
        h = h + gate2 * linear(f"{block}.mlp.fc2", inner)
    shift, scale = chunks("final_layer", 2)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    h = h.unflatten(-1, (patch, patch, -1)).unflatten(1, (side, side))  # (B, h, w, p, q, C)
    return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def test_is_the_papers_network():
    model = filled_model(num_classes=10, learn_sigma=True).double()
    x, t, cond = inputs(model)
    x = x.double()
    expected = written_out(model.state_dict(), x, t, cond["y"], 2, 4, 2)
    assert torch.allclose(model(x, t, **cond), expected, atol=1e-6)


@pytest.mark.parametrize("context", [False, True])
def test_a_modern_block_is_its_equations(context):
    """RMSNorm, QK-norm, rotary positions, SwiGLU and attention to a context, from a state dict alone."""
    torch.manual_seed(0)
    dim, heads, width = 24, 2, 5
    block = DiTBlock(dim, heads, 4.0, width if context else None, "rms", "swiglu", True, 0.0).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.3)
    state = block.state_dict()
    x, c, tokens = (torch.randn(2, *shape).double() for shape in ((6, dim), (dim,), (3, width)))
    rotary = rotary_positions(dim // heads, (2, 3)).double()

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def rms(name, h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def attention(q, k, v, turn=None):
        q, k, v = (h.unflatten(-1, (heads, -1)).transpose(1, 2) for h in (q, k, v))
        if turn is not None:
            q, k = turn(rms("attn.q_norm", q)), turn(rms("attn.k_norm", k))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return (weights @ v).transpose(1, 2).flatten(2)

    def turn(h):
        cos, sin = rotary
        even, odd = h[..., ::2], h[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    vectors = linear("adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
    h = rms("norm1", x) * (1 + vectors[1]) + vectors[0]
    expected = x + vectors[2] * linear("attn.proj", attention(*linear("attn.qkv", h).chunk(3, -1), turn))
    if context:
        h = F.layer_norm(expected, (dim,), state["norm_cross.weight"], state["norm_cross.bias"], 1e-6)
        q, k, v = (linear(f"cross_attn.{n}_proj", s) for n, s in (("q", h), ("k", tokens), ("v", tokens)))
        expected = expected + linear("cross_attn.out_proj", attention(q, k, v))
    h = rms("norm2", expected) * (1 + vectors[4]) + vectors[3]
    gate, value = linear("mlp.w12", h).chunk(2, dim=-1)
    expected = expected + vectors[5] * linear("mlp.w3", gate * torch.sigmoid(gate) * value)
    assert torch.allclose(block(x, c, tokens if context else None, rotary), expected, atol=1e-6)


@pytest.mark.parametrize("variant", ["everything", "class and context", "sit", "in context"])
@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_compiles_whole(variant, size):
    """No branch depends on values, so nothing breaks the graph."""
    model = filled_model(**VARIANTS[variant])
    x, t, cond = inputs(model, size=size)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, **cond), model(x, t, **cond), atol=1e-5)


def test_equals_the_published_implementations():
    """Numbers of facebookresearch/DiT and willisma/SiT for `filled` weights (the latter's at 1 - t / 1000,
    negated)."""
    x, t, y = noise("dit.x", 3, 4, 8, 8), torch.tensor([0.0, 17.0, 999.0]), torch.tensor([3, 10, 0])
    dit = filled_model(num_classes=10, learn_sigma=True)(x, t, y=y).flatten()
    expected = [1.0469018, -0.7954451, -1.2195156, -0.4893933, 1.3868614, 0.9240457, 1.0524659, 1.0191652]
    assert dit[:: len(dit) // 8].tolist() == pytest.approx(expected, rel=1e-4)
    assert dit.abs().mean().item() == pytest.approx(0.82713747, rel=1e-5)
    sit = filled_model(num_classes=10, learn_sigma=True, convention="sit")(x, t, y=y).flatten()
    expected = [-1.2032672, -1.3853735, 0.9106388, -0.1278549, -0.3375005, -1.6147687, 0.4633410, 0.1585798]
    assert sit[:: len(sit) // 8].tolist() == pytest.approx(expected, rel=1e-4)
    assert sit.abs().mean().item() == pytest.approx(0.83506793, rel=1e-5)


def published_keys(hidden, depth, patch, channels, classes, tokens):
    names = {
        "pos_embed": [1, tokens, hidden],
        "x_embedder.proj.weight": [hidden, channels, patch, patch],
        "x_embedder.proj.bias": [hidden],
        "y_embedder.embedding_table.weight": [classes + 1, hidden],
    }
    layers = {"t_embedder.mlp.0": (256, hidden), "t_embedder.mlp.2": (hidden, hidden)}
    layers |= {"final_layer.linear": (hidden, patch * patch * channels * 2)}
    layers |= {"final_layer.adaLN_modulation.1": (hidden, 2 * hidden)}
    for i in range(depth):
        layers[f"blocks.{i}.attn.qkv"] = (hidden, 3 * hidden)
        layers[f"blocks.{i}.attn.proj"] = (hidden, hidden)
        layers[f"blocks.{i}.mlp.fc1"] = (hidden, 4 * hidden)
        layers[f"blocks.{i}.mlp.fc2"] = (4 * hidden, hidden)
        layers[f"blocks.{i}.adaLN_modulation.1"] = (hidden, 6 * hidden)
    for name, (wide_in, wide_out) in layers.items():
        names |= {f"{name}.weight": [wide_out, wide_in], f"{name}.bias": [wide_out]}
    return names


@pytest.mark.parametrize("convention", ["dit", "sit"])
def test_published_names_and_shapes(convention):
    with torch.device("meta"):
        model = DiT("DiT-XL/2", num_classes=1000, learn_sigma=True, convention=convention)
    state = model.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == published_keys(1152, 28, 2, 4, 1000, 256)
    assert sum(tensor.numel() for tensor in state.values()) == 675_129_632  # as the repository counts them


@pytest.mark.parametrize(
    ("size", "millions"), [("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/8", 459), ("DiT-XL/1", 675)]
)
def test_sizes(size, millions):
    with torch.device("meta"):
        model = DiT(size, num_classes=1000, learn_sigma=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1.0)
    assert model.grid_size == (32 // int(size[-1]),) * 2


def test_sizes_take_overrides():
    with torch.device("meta"):
        model = DiT("DiT-S/8", depth=3, patch_size=4)
    assert len(model.blocks) == 3 and model.grid_size == (8, 8)
    assert len(DIT_SIZES) == 16


def test_names_of_the_modern_options():
    names = set(tiny(norm="rms", mlp="swiglu", qk_norm=True, positions="both").state_dict())
    for name in ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "mlp.w12", "mlp.w3"):
        assert f"blocks.1.{name}.weight" in names
    assert "final_layer.norm_final.weight" in names
    assert "pos_embed" in names and "pos_embed" not in tiny(positions="rotary").state_dict()


def test_null_class_has_two_names_and_its_own_row():
    model = filled_model(num_classes=10)
    x, t, _ = inputs(model)
    outs = [model(x, t, y=torch.full((3,), label)) for label in (-1, 10, 9)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


@pytest.mark.parametrize("variant", ["class", "vector", "context", "context tokens", "in context"])
def test_condition_and_time_reach_every_pixel(variant):
    model = filled_model(**VARIANTS[variant])
    x, t, cond = inputs(model)
    out = model(x, t, **cond)
    for name, value in cond.items():
        changed = {**cond, name: (value + 1) % 10 if value.dtype == torch.int64 else value + 1}
        assert (model(x, t, **changed) - out).abs().amax(1).min() > 1e-7
    assert (model(x, t + 100, **cond) - out).abs().amax(1).min() > 1e-7


@pytest.mark.parametrize("positions", ["sincos", "rotary", "both"])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (2, 2), (16, 10)])
def test_takes_other_and_rectangular_sizes(size, positions):
    model = filled_model(positions=positions, num_registers=2, in_context_tokens=1)
    x, t, _ = inputs(model, size=size)
    assert model(x, t).shape == x.shape


def test_built_for_a_rectangle_equals_positions_of_that_rectangle():
    model = tiny(input_size=(4, 12))
    assert torch.equal(model.pos_embed[0], sincos_positions(48, (2, 6)))
    assert model.grid_size == (2, 6)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_positions_matter(positions):
    """Rolling the input by whole patches would roll the output of a network that knows no positions."""
    model = filled_model(positions=positions)
    x, t, _ = inputs(model)
    rolled = model(x.roll(2, dims=-1), t).roll(-2, dims=-1)
    assert relative_error(rolled, model(x, t)) > 1e-3


@pytest.mark.parametrize("start", [0, 1])
def test_tokens_before_the_patches_are_not_turned(start):
    """All blocks see the patches' own angles, whatever stands before them."""
    model = filled_model(positions="rotary", num_registers=2, in_context_tokens=3, in_context_start=start)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append((args[0].shape[1], args[3])))
    x, t, _ = inputs(model)
    model(x, t)
    for (tokens, rotary), before in zip(seen, [2 if start else 5, 5], strict=True):
        assert tokens == rotary.shape[1] == before + 16
        assert torch.equal(rotary[:, before:], rotary_positions(12, (4, 4)))
        assert (rotary[0, :before] == 1).all() and not rotary[1, :before].any()


def test_sit_is_the_same_network_seen_in_flow_time():
    options = dict(num_classes=10, learn_sigma=True)
    dit, sit = filled_model(**options), filled_model(**options, convention="sit")
    x, t, cond = inputs(dit)
    assert (dit.out_channels, sit.out_channels) == (8, 4)
    assert torch.equal(sit(x, t, **cond), -dit(x, 1 - t / 1000, **cond)[:, :4])


@pytest.mark.parametrize("variant", ["modern", "everything", "class and context"])
def test_runs_in_half_precision(variant):
    model = filled_model(**VARIANTS[variant])
    x, t, cond = inputs(model)
    with torch.no_grad():
        expected = model(x, t, **cond)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model(x, t, **cond), expected) < 0.05
        model.bfloat16()
        half = {k: v if v.dtype == torch.int64 else v.bfloat16() for k, v in cond.items()}
        out = model(x.bfloat16(), t, **half)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 0.1


def forward(model, **changes):
    x, t, cond = inputs(model)
    arguments = {"x": x, "timesteps": t, **cond} | changes
    return model(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiT("DiT-M/2"), "size is 'DiT-M/2', must be one of DiT-S/1"),
        (lambda: DiT(depth=2, patch_size=2), "give hidden_size, num_heads too"),
        (lambda: tiny(input_size=7), "7x7"),
        (lambda: tiny(hidden_size=50, num_heads=5), "4 channels, not 50"),
        (lambda: tiny(num_heads=5), "heads=5"),
        (lambda: tiny(num_heads=8, positions="rotary"), "4 channels, not 6"),
        (lambda: tiny(positions="learned"), "one of sincos, rotary, both"),
        (lambda: tiny(norm="batch"), "one of layer, rms"),
        (lambda: tiny(mlp="relu"), "one of gelu, swiglu"),
        (lambda: tiny(context_dim=4, context_mode="sum"), "one of cross-attention, tokens"),
        (lambda: tiny(convention="edm"), "one of dit, sit"),
        (lambda: tiny(num_classes="sequential"), "adm_in_channels=None"),
        (lambda: tiny(num_classes=0), "num_classes=0"),
        (lambda: tiny(in_context_tokens=1, in_context_start=2), "none of the 2 blocks"),
        (lambda: forward(tiny(), x=torch.zeros(3, 4, 8, 7)), "8x7"),
        (lambda: forward(tiny(), x=torch.zeros(3, 3, 8, 8)), r"expected \(B, 4, H, W\)"),
        (lambda: forward(tiny(), timesteps=torch.zeros(1)), r"expected \(3,\)"),
        (lambda: forward(tiny(), y=torch.zeros(3).long()), "y is given, but num_classes is None"),
        (lambda: forward(tiny(num_classes=10), y=None), "y is missing"),
        (lambda: forward(tiny(num_classes=10), y=torch.zeros(3)), "expected int64 or int32"),
        (lambda: forward(tiny(**VARIANTS["vector"]), y=torch.zeros(3, 6)), r"\(3, 7\)"),
        (lambda: forward(tiny(), context=torch.zeros(3, 5, 6)), "context is given, but context_dim is None"),
        (lambda: forward(tiny(context_dim=6), context=None), "context is missing"),
        (lambda: forward(tiny(context_dim=6), context=torch.zeros(3, 5, 7)), r"expected \(3, N, 6\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
