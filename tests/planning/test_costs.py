"""What `ldm plan` counts, held against torch's own counter, the allocator's record and closed forms."""

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ldm.losses.lpips import LPIPS
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.models.discriminator import NLayerDiscriminator
from ldm.models.dit import DiT
from ldm.models.unet import UNetModel
from ldm.models.vit import VisionTransformer
from ldm.planning.meter import Cost, Meter

UNET = dict(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
    attention_resolutions=[1, 2], num_head_channels=16,
)  # fmt: skip
DD = dict(
    z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
    attn_resolutions=[16],
)  # fmt: skip
LATENT, TIMES = (4, 8, 8), ()

# name -> (network, shapes of its inputs without the batch)
NETWORKS = {
    "unet": (lambda: UNetModel(**UNET), [LATENT, TIMES]),
    "unet-se": (lambda: UNetModel(**UNET, attn_type="se"), [LATENT, TIMES]),
    "unet-updown": (lambda: UNetModel(**UNET, resblock_updown=True), [LATENT, TIMES]),
    "unet-context": (
        lambda: UNetModel(**UNET, context_dim=24, transformer_depth=2),
        [LATENT, TIMES, (7, 24)],
    ),
    "unet-3d": (
        lambda: UNetModel(**UNET | {"num_attention_blocks": [0, 0]}, dims=3, disable_middle_transformer=True),
        [(4, 2, 8, 8), TIMES],
    ),
    "dit": (lambda: DiT(hidden_size=48, depth=2, num_heads=4, patch_size=2, input_size=8), [LATENT, TIMES]),
    "dit-context": (
        lambda: DiT(
            hidden_size=48, depth=2, num_heads=4, patch_size=2, input_size=8, context_dim=24, mlp="swiglu"
        ),
        [LATENT, TIMES, (7, 24)],
    ),
    "vit": (
        lambda: VisionTransformer(
            img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=4, num_classes=10, distilled=True
        ),
        [(3, 16, 16)],
    ),
    "kl": (lambda: AutoencoderKL(DD, embed_dim=4), [(3, 32, 32)]),
    "kl-linear": (lambda: AutoencoderKL(DD | {"attn_type": "linear"}, embed_dim=4), [(3, 32, 32)]),
    "vq": (lambda: VQModel(DD | {"double_z": False}, n_embed=64, embed_dim=4), [(3, 32, 32)]),
    "discriminator": (lambda: NLayerDiscriminator(ndf=16), [(3, 64, 64)]),
    "lpips": (lambda: LPIPS(pretrained=False), [(3, 32, 32), (3, 32, 32)]),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 4, stride=2), [(8, 5, 5)]),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), [(8, 9, 7)]),
    "transposed-groups": (lambda: nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2), [(8, 5, 5)]),
}  # fmt: skip
# In the backward pass torch counts the weights of grouped convolutions as if there were no groups.
WITHOUT_ATTENTION = ("unet-se", "unet-3d", "kl-linear", "discriminator", "lpips", "transposed")


def inputs(shapes, batch: int, device: str, gradients: bool = False) -> list[torch.Tensor]:
    made = [torch.rand(batch, *shape, device=device) for shape in shapes]
    return [tensor.requires_grad_(gradients and tensor.ndim == 4) for tensor in made]


def first_tensor(out) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else first_tensor(out[0])


def metered(
    build, shapes, batch: int = 1, half: bool = False, depth: int = 1, gradients: bool = False
) -> Cost:
    """Forward and backward of a network on the meta device."""
    with torch.device("meta"):
        network = build()
    assert all(p.is_meta for p in network.parameters())
    meter = Meter(network, [network], depth, half)
    given = inputs(shapes, batch, "meta", gradients)
    with meter.running():
        meter.backward(first_tensor(network(*given)).float().square().mean())
    return meter.cost


def counted(build, shapes, backward: bool, batch: int = 1, gradients: bool = False) -> int:
    """By torch, on real tensors, attention written out in matrix products."""
    torch.manual_seed(0)
    network = build()
    given = inputs(shapes, batch, "cpu", gradients)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = first_tensor(network(*given))
        if backward:
            out.square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_pass_counts_as_torch_counts_it(name):
    build, shapes = NETWORKS[name]
    cost = metered(build, shapes, batch=3, gradients=name == "lpips")
    assert cost.forward == counted(build, shapes, backward=False, batch=3) > 0
    assert cost.forward == sum(layer.flops for layer in cost.layers)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_the_backward_pass_counts_as_torch_counts_it(name):
    build, shapes = NETWORKS[name]
    gradients = name == "lpips"  # a frozen network: its input alone has a gradient
    assert metered(build, shapes, 2, gradients=gradients).flops == counted(build, shapes, True, 2, gradients)


@pytest.mark.parametrize("name", ["depthwise", "transposed-groups"])
def test_a_convolution_costs_as_much_again_for_each_gradient(name):
    build, shapes = NETWORKS[name]
    cost = metered(build, shapes, gradients=True)
    assert cost.flops == 3 * cost.forward


def test_attention_counts_as_a_fused_kernel_of_torch():
    shape_q, shape_k, shape_v = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)
    meter = Meter(nn.Identity(), [])
    with meter.running():
        q, k, v = (
            torch.empty(shape, device="meta", requires_grad=True) for shape in (shape_q, shape_k, shape_v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        forward = meter.cost.flops
        meter.backward(out.sum())
    assert out.shape == (2, 3, 5, 6) and [t.grad.shape for t in (q, k, v)] == [shape_q, shape_k, shape_v]
    assert forward == sdpa_flop_count(shape_q, shape_k, shape_v) == 2 * 6 * 5 * 7 * (8 + 6)
    assert meter.cost.flops - forward == sdpa_backward_flop_count(out.shape, shape_q, shape_k, shape_v)


def test_attention_in_the_backward_pass_differs_by_the_weights_made_again():
    build, shapes = NETWORKS["vit"]
    tokens, width, depth = 2 + 16, 48, 2
    again = depth * 2 * tokens * tokens * width  # q k^T of all heads
    assert metered(build, shapes).flops == counted(build, shapes, backward=True) + again


def test_checkpointing_costs_a_second_forward_pass_and_keeps_less():
    plain, frugal = (
        metered(
            lambda c=c: UNetModel(**UNET, use_checkpoint=c, context_dim=8), [LATENT, TIMES, (7, 8)], batch=16
        )
        for c in (False, True)
    )
    blocks = sum(
        layer.flops for layer in plain.layers if "put_blocks." in layer.name or layer.name == "middle_block"
    )
    # torch stops to compute a block again where nothing more is needed: before its last layer.
    assert 0.6 * blocks < frugal.flops - plain.flops <= blocks
    assert frugal.forward == plain.forward
    assert frugal.saved < 0.5 * plain.saved and frugal.peak < 0.7 * plain.peak


def test_rows_are_what_was_asked_for():
    build, shapes = NETWORKS["kl"]
    assert [layer.name for layer in metered(build, shapes, depth=0).layers] == ["", ""]
    one = [layer.name for layer in metered(build, shapes).layers]
    assert one == ["encoder", "quant_conv", "post_quant_conv", "decoder", ""]
    two = {layer.name: layer for layer in metered(build, shapes, depth=2).layers}
    assert [name for name in two if name.startswith("encoder")] == [
        *("encoder.conv_in", "encoder.down.0", "encoder.down.1"),
        *("encoder.mid", "encoder.norm_out", "encoder.conv_out"),
    ]  # fmt: skip
    with torch.device("meta"):
        network = build()
    down = two["encoder.down.0"]
    assert down.parameters == sum(p.numel() for p in network.encoder.down[0].parameters())
    # Two 3x3 convolutions at 32x32, and the downsampling that the encoder calls itself.
    assert down.flops == 2 * (2 * 9 * 32 * 32 * 32**2) + 2 * 9 * 32 * 32 * 16**2
    assert sum(layer.parameters for layer in two.values()) == sum(p.numel() for p in network.parameters())
    assert two["encoder.mid"].shape == (1, 64, 16, 16)


def test_what_is_kept_has_a_closed_form():
    width = 8
    build = lambda: nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 4))  # noqa: E731
    cost = metered(build, [(width,)], batch=3)
    # The first layer keeps its input, the ReLU its output, which the second layer keeps too.
    assert {layer.name: layer.saved for layer in cost.layers} == {
        "0": 3 * 8 * 4,
        "1": 3 * 16 * 4,
        "2": 0,
        "": 0,
    }
    half = metered(build, [(width,)], batch=3, half=True)
    assert {layer.name: layer.saved for layer in half.layers} == {
        "0": 3 * 8 * 2,
        "1": 3 * 16 * 2,
        "2": 0,
        "": 0,
    }


def test_autocast_is_acted_out_as_cuda_does_it():
    seen = {}

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.Linear(8, 8)

        def forward(self, x):
            seen["conv"] = self.conv(x)
            seen["norm"] = self.norm(seen["conv"])
            seen["linear"] = self.linear(seen["conv"].flatten(2).transpose(1, 2))
            q = seen["linear"][:, None]
            seen["attention"] = F.scaled_dot_product_attention(q, q, q)
            seen["softmax"] = seen["linear"].softmax(-1)
            seen["sum"] = seen["linear"] + seen["conv"].flatten(2).transpose(1, 2)
            seen["double"] = torch.matmul(x.double(), x.double())
            return seen["attention"]

    metered(Probe, [(4, 6, 6)], half=True)
    half, full = torch.bfloat16, torch.float32
    assert {name: tensor.dtype for name, tensor in seen.items()} == {
        "conv": half, "norm": full, "linear": half, "attention": half, "softmax": full, "sum": half,
        "double": torch.float64,
    }  # fmt: skip


def tracked_peak(build, shapes, batch: int) -> int:
    """Bytes beside the parameters at the peak of a real step on the CPU, as torch's own tracker sees them."""
    torch.manual_seed(0)
    network, given = build(), inputs(shapes, batch, "cpu")
    tracker = MemTracker()
    tracker.track_external(network, *given)
    with tracker:
        first_tensor(network(*given)).float().square().mean().backward()
    before = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers(), *given))
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before


@pytest.mark.parametrize("name", ["unet", "unet-context", "dit", "kl", "vit"])
def test_the_peak_is_that_of_a_real_step(name):
    build, shapes = NETWORKS[name]
    # The CPU's attention copies a little more than a GPU's.
    assert metered(build, shapes, 16).peak == pytest.approx(tracked_peak(build, shapes, 16), rel=0.07)


def test_bytes_are_linear_in_the_batch_at_every_operation():
    build, shapes = NETWORKS["unet-context"]
    two, three, seven = (metered(build, shapes, batch, half=True).live for batch in (2, 3, 7))
    assert [a + 5 * (b - a) for a, b in zip(two, three, strict=True)] == seven


def test_nothing_is_left_behind():
    with torch.device("meta"):
        network = nn.Linear(3, 3)
    meter = Meter(network, [network])
    with meter.running():
        meter.backward(network(torch.empty(2, 3, device="meta")).sum())
    flops = meter.cost.flops
    network(torch.empty(2, 3, device="meta"))
    assert not network._forward_hooks and not network._forward_pre_hooks and meter.cost.flops == flops
