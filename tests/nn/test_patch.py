import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ldm.nn.patch import PatchEmbed, interpolate_positions, rotary_positions, sincos_positions, unpatchify


@settings(max_examples=30, deadline=None)
@given(
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 5),
    bias=st.booleans(),
)
def test_convolution_and_linear_layer_are_equal(patch, grid, channels, bias):
    torch.manual_seed(0)
    conv = PatchEmbed(patch, channels, 7, bias=bias).double()
    linear = PatchEmbed(patch, channels, 7, method="linear", bias=bias).double()
    state = conv.state_dict()
    linear.load_state_dict({**state, "proj.weight": state["proj.weight"].flatten(1)})
    x = torch.randn(2, channels, patch[0] * grid[0], patch[1] * grid[1]).double()
    assert conv(x).shape == (2, grid[0] * grid[1], 7)
    assert torch.allclose(conv(x), linear(x), atol=1e-12)


def test_a_token_sees_its_own_patch():
    embed = PatchEmbed((2, 3), in_channels=1, dim=4, image_size=(6, 12))
    x = torch.randn(1, 1, 6, 12)
    changed = x.clone()
    changed[:, :, 2:4, 9:12] += 1  # row 1, column 3 of a 3x4 grid
    touched = (embed(x) - embed(changed)).abs().sum(-1)[0].nonzero().flatten().tolist()
    assert embed.grid_size == (3, 4)
    assert touched == [1 * 4 + 3]


@pytest.mark.parametrize("method", ["conv", "linear"])
def test_every_parameter_receives_a_gradient(method):
    embed = PatchEmbed(2, 3, 5, method=method)
    embed(torch.randn(1, 3, 4, 6)).square().sum().backward()
    assert all(p.grad.abs().min() > 0 for p in embed.parameters())


def test_unpatchify_puts_the_patches_back():
    image = torch.arange(2 * 5 * 4 * 9.0).reshape(2, 5, 4, 9)
    tokens = F.unfold(image, (2, 3), stride=(2, 3)).transpose(1, 2)  # (B, 6, C p q)
    tokens = tokens.unflatten(-1, (5, 6)).transpose(-1, -2).flatten(-2)  # (B, 6, p q C)
    assert torch.equal(unpatchify(tokens, (2, 3), (2, 3)), image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchEmbed(4, image_size=30), "30x30 .* patches of 4x4"),
        (lambda: PatchEmbed((4, 5))(torch.zeros(1, 3, 8, 8)), "8x8 .* patches of 4x5"),
        (lambda: PatchEmbed(4, image_size=8)(torch.zeros(1, 3, 8, 12)), "8x12.* built for 8x8"),
        (lambda: PatchEmbed(4)(torch.zeros(1, 4, 8, 8)), r"expected \(B, 3, H, W\)"),
        (lambda: PatchEmbed(4)(torch.zeros(3, 8, 8)), r"expected \(B, 3, H, W\)"),
        (lambda: PatchEmbed(0), "patch_size=0"),
        (lambda: PatchEmbed((2, 2, 2)), "patch_size=.2, 2, 2. is not"),
        (lambda: PatchEmbed(2, method="fold"), "conv, linear"),
        (lambda: sincos_positions(6, (2, 2)), "multiple of 4 channels, not 6"),
        (lambda: rotary_positions(2, (2, 2)), "multiple of 4 channels, not 2"),
        (lambda: interpolate_positions(torch.zeros(1, 9, 4), (2, 4), (3, 3)), r"expected \(1, 8, dim\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sincos_positions_are_the_formula():
    table = sincos_positions(16, (3, 5)).reshape(3, 5, 16)
    for row in range(3):
        for column in range(5):
            expected = [
                f(position / 10000 ** (i / 4))
                for position in (column, row)
                for f in (math.sin, math.cos)
                for i in range(4)
            ]
            assert table[row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotary_positions_are_the_formula():
    cos, sin = (part.reshape(3, 5, 6) for part in rotary_positions(12, (3, 5), theta=100.0))
    for row in range(3):
        for column in range(5):
            angles = [position / 100 ** (i / 3) for position in (row, column) for i in range(3)]
            assert cos[row, column].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
            assert sin[row, column].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-6)


@pytest.mark.parametrize("positions", [sincos_positions, rotary_positions])
def test_another_grid_is_laid_over_the_range_of_the_first(positions):
    base, double = positions(8, (3, 4)), positions(8, (6, 8), base_grid=(3, 4))
    base = base.unflatten(-2, (3, 4))
    double = double.unflatten(-2, (6, 8))
    assert torch.allclose(double[..., ::2, ::2, :], base, atol=1e-6)
    assert torch.equal(positions(8, (3, 4), base_grid=(3, 4)).unflatten(-2, (3, 4)), base)


def test_interpolation_keeps_the_prefix_and_a_plane():
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    plane = torch.stack([row + 0.5, column + 0.5, row + 2 * column], dim=-1)  # pixel centres
    positions = torch.cat([torch.randn(1, 2, 3), plane.reshape(1, 48, 3)], dim=1)
    out = interpolate_positions(positions, (8, 6), (16, 12), prefix_tokens=2)
    assert torch.equal(out[:, :2], positions[:, :2])
    grid = out[0, 2:].reshape(16, 12, 3)[4:-4, 4:-4]  # away from the border, which is not linear
    centres = (torch.arange(16.0)[4:-4] + 0.5) / 2
    assert torch.allclose(grid[..., 0], centres[:, None].expand(8, 4), atol=1e-4)
    assert torch.allclose(grid[..., 1], ((torch.arange(12.0)[4:-4] + 0.5) / 2).expand(8, 4), atol=1e-4)


def test_interpolation_keeps_dtype_and_the_same_grid():
    positions = torch.randn(1, 7, 4)
    assert interpolate_positions(positions, (2, 3), (2, 3), prefix_tokens=1) is positions
    half = interpolate_positions(positions.bfloat16(), (2, 3), (4, 5), prefix_tokens=1)
    assert half.dtype == torch.bfloat16 and half.shape == (1, 21, 4)


def test_gradients_reach_interpolated_positions():
    positions = torch.randn(1, 13, 4, requires_grad=True)
    interpolate_positions(positions, (3, 4), (5, 2), prefix_tokens=1).square().sum().backward()
    assert positions.grad.abs().min() > 0
