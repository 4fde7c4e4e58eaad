"""`attn_type` in the autoencoder and in the UNet: every kind is built by its name and trains."""

import copy

import pytest
import torch
from reference_data import noise
from torch import nn

from ldm import config as configuration
from ldm.arguments import arguments_of
from ldm.checkpoints.description import NotExpressible
from ldm.checkpoints.diffusers.unet_writing import unet_config
from ldm.checkpoints.diffusers.vae import first_stage_config
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNetModel
from ldm.nn.attention import ATTENTION_BUILDERS, AttentionBlock, AttnBlock, LinAttnBlock, make_attn
from ldm.nn.channel_attention import CBAM, EfficientChannelAttention, SqueezeExcitation

KINDS = {
    "vanilla": AttnBlock,
    "linear": LinAttnBlock,
    "se": SqueezeExcitation,
    "cbam": CBAM,
    "eca": EfficientChannelAttention,
    "none": nn.Identity,
}


def autoencoder(attn_type: str, **options) -> AutoencoderKL:
    ddconfig = dict(
        double_z=True, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=16, ch_mult=[1, 2],
        num_res_blocks=1, attn_resolutions=[16], attn_type=attn_type, num_groups=4, **options,
    )  # fmt: skip
    return AutoencoderKL(ddconfig, embed_dim=4)


def unet(attn_type: str, **changes) -> UNetModel:
    arguments = dict(
        in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
        attention_resolutions=[2], num_heads=2, attn_type=attn_type,
    )  # fmt: skip
    return UNetModel(**arguments | changes)


def reconstruction_loss(model: AutoencoderKL) -> torch.Tensor:
    x = noise("x", 2, 3, 16, 16)
    reconstruction, posterior = model(x, noise=noise("z", 2, 4, 8, 8))
    return (reconstruction - x).square().mean() + 1e-3 * posterior.kl().mean()


def denoising_loss(model: UNetModel) -> torch.Tensor:
    x = noise("x", 2, 4, 8, 8)
    return (model(x, torch.tensor([10.0, 700.0])) - noise("target", 2, 4, 8, 8)).square().mean()


def counted(model: nn.Module, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


def moved_off_zero(model: nn.Module) -> nn.Module:
    """Networks start with zeros that let no gradient through."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * noise(name, *parameter.shape))
    return model


@pytest.mark.parametrize(
    "build, attn_type, loss_of",
    [(autoencoder, name, reconstruction_loss) for name in ATTENTION_BUILDERS]
    + [(unet, name, denoising_loss) for name in ("attention", *ATTENTION_BUILDERS)],
)
def test_every_kind_trains_with_all_its_parameters(build, attn_type, loss_of):
    torch.manual_seed(0)
    # With sixteen channels the usual reduction leaves one, which the ReLU may shut.
    options = {"reduction": 2} if attn_type in ("se", "cbam") else None
    model = moved_off_zero(build(attn_type, attn_options=options))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = loss_of(model)
    before.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    optimizer.step()
    assert loss_of(model) < before


def test_the_kinds_stand_where_they_were_asked_for():
    for attn_type, kind in KINDS.items():
        if kind is nn.Identity:
            continue
        # One block of the encoder's first level, two of the decoder's, and both middles.
        assert counted(autoencoder(attn_type), kind) == 5
        # One in the encoder's second level, two in the decoder's, one in the middle.
        model = unet(attn_type)
        assert counted(model, kind) == 4 and counted(model, AttentionBlock) == 0
        assert type(model.middle_block[1]) is kind and type(model.input_blocks[3][1]) is kind
        assert counted(unet(attn_type, disable_middle_transformer=True), kind) == 3
        assert counted(unet(attn_type, num_attention_blocks=[0, 0]), kind) == 1


def test_the_default_is_as_before():
    assert set(unet("attention").state_dict()) == set(UNetModel(
        in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
        attention_resolutions=[2], num_heads=2,
    ).state_dict())  # fmt: skip
    # The heads are only needed by what has heads.
    with pytest.raises(ValueError, match="num_heads or num_head_channels"):
        unet("attention", num_heads=-1)
    unet("se", num_heads=-1)


def test_options_reach_the_blocks():
    assert make_attn(32, "se", options={"reduction": 4}).fc[0].out_features == 8
    block = unet("cbam", attn_options={"reduction": 8, "kernel_size": 3}).middle_block[1]
    assert block.channelattention.fc1.out_channels == 8 and block.spatialattention.conv1.kernel_size == (3, 3)
    middle = autoencoder("eca", attn_options={"gamma": 1.0, "b": 0.0}).encoder.mid.attn_1
    assert middle.conv.kernel_size == (5,)  # log2(32) = 5


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: autoencoder("sse"), "attn_type is 'sse', must be one of vanilla.*se, cbam, eca"),
        (lambda: unet("sse"), "attn_type is 'sse', must be one of attention, vanilla.*se, cbam, eca"),
        (lambda: unet("se", attn_options={"ratio": 4}), "option of attn_type='se' is 'ratio'.*reduction"),
        (lambda: autoencoder("linear", attn_options={"b": 1}), "attn_type='linear' is 'b'.*nothing"),
        (lambda: unet("attention", attn_options={"b": 1}), "no effect on attn_type=\"attention\""),
        (lambda: unet("se", context_dim=8), "takes the place of the SpatialTransformers"),
        (lambda: unet("cbam", dims=1), "is for dims=2, not dims=1"),
        (lambda: unet("se", attn_options={"reduction": 128}), "reduction=128 of 64"),
    ],
)  # fmt: skip
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_config_reaches_kind_and_options():
    part = {
        "target": "ldm.models.unet.UNetModel",
        "params": dict(
            in_channels=4, out_channels=4, model_channels=32, channel_mult=[1], num_res_blocks=1,
            attention_resolutions=[1], attn_type="se", attn_options={"reduction": 4},
        ),
    }  # fmt: skip
    configuration.check({"network": part})
    assert configuration.instantiate(part).middle_block[1].fc[0].out_features == 8
    wrong = copy.deepcopy(part)
    wrong["params"]["attn_options"] = 4
    with pytest.raises(configuration.ConfigError, match="attn_options"):
        configuration.check({"network": wrong})


@pytest.mark.parametrize("build, loss_of", [(autoencoder, reconstruction_loss), (unet, denoising_loss)])
@pytest.mark.parametrize("parts", ["channel", "spatial"])
def test_a_half_of_cbam_by_config(build, loss_of, parts):
    torch.manual_seed(0)
    model = moved_off_zero(build("cbam", attn_options={"parts": parts, "reduction": 2}))
    names = {name.split(".")[-3] for name, _ in model.named_parameters() if "attention." in name}
    assert names == {f"{parts}attention"}
    loss_of(model).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    if build is unet:
        again = UNetModel(**arguments_of(model))
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("attn_type", ["vanilla", "linear", "se", "cbam", "eca"])
def test_attention_stands_at_the_resolution_asked_for_alone(attn_type):
    def places(model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if type(module) is KINDS[attn_type]]

    dd = dict(z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=16, ch_mult=[1, 1, 2],
              num_res_blocks=1, attn_type=attn_type, num_groups=4)  # fmt: skip
    found = places(AutoencoderKL({**dd, "attn_resolutions": [16]}, embed_dim=4))
    assert sorted(found) == [
        *("decoder.mid.attn_1", "decoder.up.1.attn.0", "decoder.up.1.attn.1"),
        *("encoder.down.1.attn.0", "encoder.mid.attn_1"),
    ]
    # Levels 1, 2 and 4 times smaller, with one residual block each: input blocks 1, 3 and 5.
    found = places(unet(attn_type, channel_mult=[1, 1, 2], attention_resolutions=[1, 4]))
    assert found == [
        *("input_blocks.1.1", "input_blocks.5.1", "middle_block.1"),
        *("output_blocks.0.1", "output_blocks.1.1", "output_blocks.4.1", "output_blocks.5.1"),
    ]


def test_the_network_remembers_its_arguments():
    model = unet("cbam", attn_options={"reduction": 4})
    again = UNetModel(**arguments_of(model))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in again.state_dict().items()} == shapes
    first = autoencoder("se", attn_options={"reduction": 4})
    again = AutoencoderKL(**arguments_of(first))
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in first.parameters()]


def test_diffusers_has_no_place_for_them():
    with pytest.raises(NotExpressible, match="attn_type is 'se'"):
        unet_config(unet("se"))
    with pytest.raises(NotExpressible, match="attention is eca"):
        first_stage_config(autoencoder("eca"))
