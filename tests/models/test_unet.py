"""UNetModel: its arguments, what it refuses, gradients and checkpointing."""

import pytest
import torch
from reference_data import filled_state_dict, noise, relative_error
from torch import nn

from ldm.models.unet import UNetModel
from ldm.nn.attention import AttentionBlock
from ldm.nn.resblock import TimestepResBlock
from ldm.nn.transformer import BasicTransformerBlock, SpatialTransformer

SMALL = {
    "in_channels": 3,
    "out_channels": 2,
    "model_channels": 8,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
    "num_groups": 4,
}
CONTEXT = {"context_dim": 6}


def small(**changes) -> UNetModel:
    """A UNet of a few thousand parameters, none of them zero."""
    model = UNetModel(**SMALL | changes)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(filled_state_dict(shapes))
    return model.eval()


def inputs(*spatial: int) -> tuple[torch.Tensor, torch.Tensor]:
    return noise("x", 2, 3, *(spatial or (6, 4))), torch.tensor([3, 801])


def context(dim: int = 6, tokens: int = 5) -> torch.Tensor:
    return noise("context", 2, tokens, dim)


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


# --- what comes out


def test_starts_at_zero_whatever_the_input():
    x, t = inputs()
    output = UNetModel(**SMALL)(x, t)
    assert output.shape == (2, 2, 6, 4)
    assert not output.any()


@pytest.mark.parametrize("seed_block", ["res", "attention", "transformer"])
def test_residual_branches_start_at_zero(seed_block):
    model = UNetModel(**SMALL | (CONTEXT if seed_block == "transformer" else {}))
    last = {
        "res": [m.out_layers[3] for m in model.modules() if isinstance(m, TimestepResBlock)],
        "attention": [m.proj_out for m in model.modules() if isinstance(m, AttentionBlock)],
        "transformer": [m.proj_out for m in model.modules() if isinstance(m, SpatialTransformer)],
    }[seed_block]
    assert last and not any(p.any() for layer in last for p in layer.parameters())


@pytest.mark.parametrize("use_spatial_transformer", [False, True])
@pytest.mark.parametrize("spatial", [(8,), (6, 4), (3, 4, 6)], ids=["1d", "2d", "3d"])
def test_dimensions(spatial, use_spatial_transformer):
    model = small(dims=len(spatial), use_spatial_transformer=use_spatial_transformer)
    output = model(*inputs(*spatial))
    assert output.shape == (2, 2, *spatial)
    assert output.std() > 0


def test_a_volume_of_one_slice_with_flat_kernels_is_an_image():
    """Kernels of the middle slice alone see no neighbours: the 3D network then equals the 2D one."""
    flat, volume = small(), small(dims=3)
    weights = {}
    for name, target in volume.state_dict().items():
        weight = flat.state_dict()[name]
        if target.ndim == 5:  # (out, in, 3, 3, 3), or (out, in, 1, 1, 1)
            middle = torch.zeros_like(target)
            middle[:, :, target.shape[2] // 2] = weight
            weight = middle
        weights[name] = weight
    volume.load_state_dict(weights)
    x, t = inputs()
    assert relative_error(volume(x[:, :, None], t)[:, :, 0], flat(x, t)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_scale_shift_norm": True, "resblock_updown": True},
        {"conv_resample": False},
        {"use_new_attention_order": True},
        {"num_head_channels": 4, "num_heads": -1},
        {"num_heads_upsample": 4},
        {"num_res_blocks": (1, 2)},
        {"channel_mult": (0.5, 1, 2), "attention_resolutions": (1, 4), "dropout": 0.1},
        {"num_classes": 7},
        {"num_classes": "continuous"},
        {"num_classes": "timestep"},
        {"num_classes": "sequential", "adm_in_channels": 5},
        {"use_spatial_transformer": True},
        CONTEXT,
        CONTEXT
        | {"use_linear_in_transformer": True, "transformer_depth": (0, 2), "attention_resolutions": (1, 2)},
        CONTEXT | {"transformer_depth": 2, "transformer_depth_middle": 1, "context_dim": [6]},
        CONTEXT | {"disable_self_attentions": (False, True), "disable_middle_self_attn": True},
        CONTEXT | {"disable_middle_transformer": True, "num_attention_blocks": (0, 1)},
        {"n_embed": 11},
    ],
)
@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_every_parameter_learns(changes, use_checkpoint):
    model = small(use_checkpoint=use_checkpoint, **changes).train()
    y = {
        7: torch.tensor([0, 6]),
        "continuous": torch.tensor([0.5, -1.0]),
        "timestep": torch.tensor([3, 700]),
        "sequential": noise("y", 2, 5),
        None: None,
    }[changes.get("num_classes")]
    x, t = inputs(8, 4)
    output = model(x, t, context=context() if "context_dim" in changes else None, y=y)
    assert output.shape == (2, changes.get("n_embed", 2), 8, 4)
    output.square().sum().backward()
    silent = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and not (p.grad is not None and p.grad.any())
    ]
    assert silent == []
    frozen = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"out"} if "n_embed" in changes else set())


def gradients(model, x, t, tokens, autocast):
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x, t, context=tokens).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("changes", [{}, CONTEXT], ids=["attention", "transformer"])
def test_checkpointed_equals_plain(changes, autocast):
    x, t = inputs()
    tokens = context() if changes else None
    plain = gradients(small(dropout=0.3, **changes).train(), x, t, tokens, autocast)
    checkpointed = gradients(
        small(dropout=0.3, use_checkpoint=True, **changes).train(), x, t, tokens, autocast
    )
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, plain, strict=True))
    other_noise = gradients(small(dropout=0.2, **changes).train(), x, t, tokens, autocast)
    assert not torch.equal(other_noise[0], plain[0])


@pytest.mark.parametrize("changes", [{}, CONTEXT], ids=["attention", "transformer"])
def test_use_checkpoint_recomputes_every_kind_of_block(changes):
    model, (x, t) = small(use_checkpoint=True, resblock_updown=True, **changes), inputs()
    kinds = (TimestepResBlock, AttentionBlock, BasicTransformerBlock)
    runs = {}
    for block in (module for module in model.modules() if isinstance(module, kinds)):
        norm = next(m for m in block.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)))
        runs[norm] = 0
        norm.register_forward_hook(lambda module, *_: runs.update({module: runs[module] + 1}))
    model(x, t, context=context() if changes else None).sum().backward()
    assert len(runs) > 5
    assert set(runs.values()) == {2}


def test_epsilons_of_the_norms():
    """1e-5 as in guided-diffusion, but 1e-6 before a transformer, as in taming-transformers."""
    model = small(n_embed=5, **CONTEXT)
    fine = {name for name, m in model.named_modules() if isinstance(m, nn.GroupNorm) and m.eps == 1e-6}
    assert fine == {f"{name}.norm" for name, m in model.named_modules() if isinstance(m, SpatialTransformer)}
    assert {m.eps for m in model.modules() if isinstance(m, nn.GroupNorm)} == {1e-6, 1e-5}


@pytest.mark.parametrize("changes", [{}, CONTEXT], ids=["attention", "transformer"])
def test_memory_layout_and_batch_do_not_matter(changes):
    model, (x, t) = small(**changes), inputs()
    tokens = context() if changes else None
    expected = model(x, t, context=tokens)
    alone = [
        model(x[i : i + 1], t[i : i + 1], context=None if tokens is None else tokens[i : i + 1])
        for i in (0, 1)
    ]
    assert relative_error(torch.cat(alone), expected) < 1e-5
    model.to(memory_format=torch.channels_last)
    output = model(x.to(memory_format=torch.channels_last), t, context=tokens)
    assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("num_classes", ["timestep", "sequential"])
def test_runs_in_the_dtype_of_its_weights(num_classes, dtype, tolerance):
    model = small(
        num_classes=num_classes, adm_in_channels=5 if num_classes == "sequential" else None, **CONTEXT
    )
    x, t = inputs()
    y = noise("y", 2, 5) if num_classes == "sequential" else torch.tensor([3.0, 700.0])
    expected = model(x, t, context=context(), y=y)
    output = model.to(dtype)(x.to(dtype), t, context=context().to(dtype), y=y)
    assert output.dtype == dtype
    assert relative_error(output, expected) < tolerance


def test_time_context_and_labels_reach_the_output():
    x, t = inputs()
    model = small(num_classes=7, **CONTEXT)
    y = torch.tensor([1, 2])
    base = model(x, t, context=context(), y=y)
    for other in (
        model(x, t + 1, context=context(), y=y),
        model(x, t + 0.5, context=context(), y=y),
        model(x, t, context=context().flip(1) * 2, y=y),
        model(x, t, context=context(), y=y + 1),
    ):
        assert relative_error(other, base) > 1e-4
    # Tokens carry no position: their order is nothing to the attention.
    assert relative_error(model(x, t, context=context().flip(1), y=y), base) < 1e-5


def test_continuous_labels_may_have_a_last_axis():
    model, y = small(num_classes="continuous"), torch.tensor([0.5, -1.0])
    assert torch.equal(model(*inputs(), y=y), model(*inputs(), y=y[:, None]))


# --- what is built


def test_attention_stands_where_it_is_asked_for():
    levels = {"channel_mult": (1, 1, 1), "num_res_blocks": 2}
    # Per attended level 2 in the encoder and 3 in the decoder, and one in the middle.
    assert count(small(**levels | {"attention_resolutions": ()}), AttentionBlock) == 1
    assert count(small(**levels | {"attention_resolutions": (1, 4, 64)}), AttentionBlock) == 11
    fewer = levels | {"attention_resolutions": (1, 4), "num_attention_blocks": (1, 2, 0)}
    assert count(small(**fewer), AttentionBlock) == 3  # Level 0: one on each side; level 2: none.
    assert count(small(**levels | {"attention_resolutions": (2,)} | CONTEXT), SpatialTransformer) == 6


def test_transformer_depths():
    model = small(attention_resolutions=(1, 2), transformer_depth=(0, 3), **CONTEXT)
    assert count(model, BasicTransformerBlock) == 3 + 3 + 2 * 3  # Encoder, middle, decoder.
    assert count(model.middle_block, BasicTransformerBlock) == 3
    model = small(transformer_depth=3, transformer_depth_middle=1, **CONTEXT)
    assert count(model.middle_block, BasicTransformerBlock) == 1


def test_disabled_self_attention_attends_to_the_context():
    model = small(attention_resolutions=(1, 2), disable_self_attentions=[True, False], **CONTEXT)
    widths = {
        n: m.attn1.to_k.in_features for n, m in model.named_modules() if isinstance(m, BasicTransformerBlock)
    }
    assert {n: w for n, w in widths.items() if w == 6}.keys() == {
        "input_blocks.1.1.transformer_blocks.0",
        "output_blocks.2.1.transformer_blocks.0",
        "output_blocks.3.1.transformer_blocks.0",
    }
    assert (
        small(disable_middle_self_attn=True, **CONTEXT)
        .middle_block[1]
        .transformer_blocks[0]
        .disable_self_attn
    )


@pytest.mark.parametrize("legacy, inner", [(True, (2, 24)), (False, (2, 20))])
def test_legacy_spreads_the_remainder_over_the_heads(legacy, inner):
    model = small(model_channels=24, channel_mult=(1,), num_head_channels=10, legacy=legacy, **CONTEXT)
    attention = model.middle_block[1].transformer_blocks[0].attn1
    assert (attention.heads, attention.to_q.out_features) == inner
    assert model(*inputs(), context=context()).shape == (2, 2, 6, 4)


def test_heads_of_the_decoder():
    model = small(num_heads=2, num_heads_upsample=4)
    heads = {n: m.attention.num_heads for n, m in model.named_modules() if isinstance(m, AttentionBlock)}
    assert heads == {
        "input_blocks.3.1": 2,
        "middle_block.1": 2,
        "output_blocks.0.1": 4,
        "output_blocks.1.1": 4,
    }


def test_names_of_other_implementations_are_taken():
    x, t = inputs()
    plain = small(**CONTEXT)
    same = small(image_size=32, use_fp16=True, spatial_transformer_attn_type="softmax-xformers", **CONTEXT)
    assert torch.equal(same(x, t, context=context()), plain(x, t, context=context()))
    assert torch.equal(small(context_dim=[6])(x, t, context=[context()]), plain(x, t, context=context()))


# --- what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"num_heads": 3}, "num_heads=3 does not divide 16"),
        (CONTEXT | {"num_heads": 3}, "num_heads=3 does not divide 16"),
        (CONTEXT | {"num_head_channels": 32}, "num_head_channels=32 must be from 1 to 16"),
        ({"num_groups": 32}, "num_groups=32 does not divide 8 channels.*1, 2, 4, 8"),
        ({"dims": 4}, "dims is 4"),
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"num_res_blocks": (1, 2, 3)}, r"num_res_blocks=\[1, 2, 3\] has 3 entries for 2 levels"),
        ({"transformer_depth": (1,)}, r"transformer_depth=\[1\] has 1 entries for 2 levels"),
        (CONTEXT | {"disable_self_attentions": [True]}, r"disable_self_attentions=\[True\] has 1 entries"),
        ({"num_attention_blocks": [1]}, r"num_attention_blocks=\[1\] has 1 entries"),
        ({"num_attention_blocks": [1, 2]}, r"num_attention_blocks=\[1, 2\] exceeds num_res_blocks=\[1, 1\]"),
        ({"disable_self_attentions": [True, False]}, "with a context_dim"),
        ({"disable_middle_self_attn": True}, "with a context_dim"),
        (CONTEXT | {"use_spatial_transformer": False}, "context_dim=6 needs use_spatial_transformer"),
        (CONTEXT | {"num_heads_upsample": 4}, "num_heads_upsample=4"),
        ({"num_heads_upsample": 4, "legacy": False}, "num_heads_upsample=4"),
        ({"spatial_transformer_attn_type": "linear"}, "is 'linear', must be.*softmax-xformers"),
        ({"num_classes": "words"}, "num_classes is 'words'.*continuous, timestep, sequential"),
        ({"num_classes": "sequential"}, "needs adm_in_channels"),
        ({"num_classes": 10, "adm_in_channels": 5}, "adm_in_channels=5 needs"),
        ({"adm_in_channels": 5}, "adm_in_channels=5 needs"),
        (CONTEXT | {"context_dim": [6, 7], "transformer_depth": 3}, r"context_dim=\[6, 7\].*depth=3"),
    ],
)
def test_contradictory_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetModel(**SMALL | changes)


@pytest.mark.parametrize(
    "changes, arguments, message",
    [
        ({}, {"x": torch.zeros(2, 4, 6, 4)}, r"\(2, 4, 6, 4\), expected \(B, 3, H, W\)"),
        ({}, {"x": torch.zeros(2, 3, 6)}, r"expected \(B, 3, H, W\)"),
        ({"dims": 1}, {}, r"expected \(B, 3, W\)"),
        ({}, {"x": torch.zeros(2, 3, 6, 5)}, r"\(6, 5\) pixels are no multiple of 2"),
        ({"dims": 3}, {"x": torch.zeros(2, 3, 2, 6, 5)}, r"\(2, 6, 5\) pixels are no multiple of 2"),
        ({}, {"timesteps": torch.tensor(3)}, r"timesteps has shape \(\), expected \(2,\)"),
        ({}, {"timesteps": torch.tensor([3])}, r"timesteps has shape \(1,\), expected \(2,\)"),
        ({}, {"y": torch.tensor([1, 2])}, "num_classes is None"),
        ({"num_classes": 7}, {}, "y is missing, but num_classes is 7"),
        (
            {"num_classes": 7},
            {"y": torch.tensor([1])},
            r"shape \(1,\), expected int64 or int32 of shape \(2,\)",
        ),
        ({"num_classes": 7}, {"y": torch.tensor([1.0, 2.0])}, "y is torch.float32"),
        (
            {"num_classes": "sequential", "adm_in_channels": 5},
            {"y": torch.zeros(2, 4)},
            r"y is torch.float32 of shape \(2, 4\), expected numbers of shape \(2, 5\)",
        ),
        ({"num_classes": "continuous"}, {"y": torch.zeros(2, 2)}, r"of shape \(2,\) or \(2, 1\)"),
        ({}, {"context": torch.zeros(2, 5, 6)}, "context_dim is None"),
        (CONTEXT, {}, "context is missing, but context_dim is 6"),
        (CONTEXT, {"context": torch.zeros(2, 5, 7)}, r"\(2, 5, 7\), expected \(2, N, 6\)"),
        (CONTEXT, {"context": torch.zeros(2, 6)}, r"\(2, 6\), expected \(2, N, 6\)"),
        (CONTEXT, {"context": torch.zeros(1, 5, 6)}, r"\(1, 5, 6\), expected \(2, N, 6\)"),
    ],
)
def test_inputs_that_do_not_fit(changes, arguments, message):
    x, t = inputs()
    with pytest.raises(ValueError, match=message):
        small(**changes)(**{"x": x, "timesteps": t} | arguments)
