import pytest
import torch
from reference_data import filled, load_cases, load_keys, relative_error
from torch.nn import functional as F

from ldm.nn.channel_attention import (
    CBAM,
    ChannelAttention,
    EfficientChannelAttention,
    SpatialAttention,
    SqueezeExcitation,
    eca_kernel_size,
)

REFERENCE = {
    "squeeze_excitation": lambda: SqueezeExcitation(32, reduction=8),
    "cbam": lambda: CBAM(32, reduction=4, kernel_size=7),
    "cbam_channel": lambda: ChannelAttention(32, reduction=8),
    "cbam_spatial": lambda: SpatialAttention(kernel_size=3),
    "eca": lambda: EfficientChannelAttention(32),
}
LAYERS = {"se": SqueezeExcitation, "cbam": CBAM, "eca": EfficientChannelAttention}


@pytest.mark.parametrize("case", REFERENCE)
def test_equals_the_reference(case):
    keys, cases = load_keys("attention-variants")[case], load_cases("attention-variants")
    layer = REFERENCE[case]()
    assert {name: list(p.shape) for name, p in layer.state_dict().items()} == keys
    layer.load_state_dict({name: filled(name, tuple(shape)) for name, shape in keys.items()})
    assert relative_error(layer(cases[f"{case}.input0"]), cases[f"{case}.output"]) < 1e-5


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 9)])
@pytest.mark.parametrize("channels", [33, 16])
@pytest.mark.parametrize("kind", LAYERS)
def test_scales_down_and_trains_every_parameter(kind, channels, size):
    torch.manual_seed(0)
    layer = LAYERS[kind](channels)
    x = torch.randn(16, channels, *size, requires_grad=True)  # enough samples for each ReLU to open
    out = layer(x)
    weights = out / x
    assert out.shape == x.shape
    assert ((weights > 0) & (weights < 1)).all()
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_squeeze_excitation_is_its_formula():
    torch.manual_seed(0)
    layer, x = SqueezeExcitation(12, reduction=4).double(), torch.randn(2, 12, 3, 5).double()
    first, second = layer.fc[0].weight, layer.fc[2].weight
    for image, out in zip(x, layer(x), strict=True):
        weights = torch.sigmoid(second @ torch.relu(first @ image.flatten(1).mean(1)))
        assert torch.allclose(out, weights[:, None, None] * image, atol=1e-12)


def test_cbam_weighs_channels_before_places():
    torch.manual_seed(0)
    layer, x = CBAM(8, reduction=2, kernel_size=3).double(), torch.randn(2, 8, 4, 6).double()
    fc1, fc2 = (conv.weight[:, :, 0, 0] for conv in (layer.channelattention.fc1, layer.channelattention.fc2))
    pooled = x.flatten(2)
    by_channel = sum(torch.relu(p @ fc1.T) @ fc2.T for p in (pooled.mean(2), pooled.max(2).values))
    h = x * torch.sigmoid(by_channel)[:, :, None, None]
    maps = torch.stack([h.mean(1), h.max(1).values], dim=1)
    by_place = F.conv2d(maps, layer.spatialattention.conv1.weight, padding=1)
    assert torch.allclose(layer(x), h * torch.sigmoid(by_place), atol=1e-12)


def test_one_half_of_cbam_alone():
    x = torch.randn(2, 8, 4, 6)
    channel, spatial = CBAM(8, reduction=2, parts="channel"), CBAM(8, kernel_size=3, parts="spatial")
    assert list(channel.state_dict()) == ["channelattention.fc1.weight", "channelattention.fc2.weight"]
    assert list(spatial.state_dict()) == ["spatialattention.conv1.weight"]
    assert torch.equal(channel(x), x * channel.channelattention(x))
    assert torch.equal(spatial(x), x * spatial.spatialattention(x))
    both = CBAM(8, reduction=2, kernel_size=3)
    both.load_state_dict({**channel.state_dict(), **spatial.state_dict()})
    assert torch.equal(both(x), spatial(channel(x)))
    CBAM(8, reduction=16, parts="spatial")  # a reduction that no layer uses


def test_eca_couples_neighbouring_channels_only():
    layer = EfficientChannelAttention(64)
    x = torch.randn(1, 64, 2, 2)
    changed = x.clone()
    changed[:, 30] += 1
    with torch.no_grad():
        ratio = (layer(changed) / changed) / (layer(x) / x)
    touched = (ratio - 1).abs().amax((0, 2, 3)).gt(1e-6).nonzero().flatten().tolist()
    assert touched == [29, 30, 31]


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 1), (4, 1), (8, 3), (32, 3), (64, 3), (128, 5), (256, 5), (512, 5), (2**13, 7)]
)
def test_eca_kernel_size(channels, size):
    assert eca_kernel_size(channels) == size
    assert EfficientChannelAttention(channels).conv.kernel_size == (size,)


def test_eca_kernel_size_follows_gamma_and_b():
    assert eca_kernel_size(256, gamma=1, b=0) == 9  # 8, then the next odd number
    assert eca_kernel_size(256, gamma=1, b=-1) == 7
    assert EfficientChannelAttention(256, gamma=1, b=0).conv.kernel_size == (9,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SqueezeExcitation(8, reduction=16), "8 channels must be from 1 to 8"),
        (lambda: CBAM(8, reduction=0), "reduction=0"),
        (lambda: SpatialAttention(kernel_size=4), "odd"),
        (lambda: CBAM(32, parts="places"), "'places', must be one of both, channel, spatial"),
        (lambda: eca_kernel_size(0), "channels=0"),
        (lambda: eca_kernel_size(8, gamma=0), "gamma=0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
