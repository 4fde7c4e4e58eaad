"""`LatentDiffusion` and `sample`, on Gaussian data whose best network is known in closed form."""

import pytest
import torch
from torch import nn

import ldm
from ldm.conditioning import ClassEmbedder, ClassLabel, Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.random import normal
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule
from ldm.latent_diffusion import LatentDiffusion, default_spacing, sample, sampling_sigmas
from ldm.models.autoencoder import IdentityFirstStage

MEANS = (-1.0, 0.5, 2.0, 0.25)  # of the classes, the last without a class
STD = 0.5
LABELS = torch.tensor([0, 1, 2, 1])


class BestNetwork(nn.Module):
    """What a perfect network says about data N(mean of the class, STD^2); keeps its batch sizes."""

    def __init__(self, denoiser: Denoiser, channels: int = 2, outputs: int = 1):
        super().__init__()
        self.denoiser, self.in_channels, self.out_channels = denoiser, channels, channels * outputs
        self.outputs = outputs
        self.batches: list[int] = []

    def forward(self, z, t, context=None, y=None):
        self.batches.append(len(z))
        schedule = self.denoiser.schedule
        sigma = schedule.sigma(t)
        # network_input scaled x; undo it.
        scale = schedule.scale(sigma)
        if self.denoiser.prediction == "edm":
            scale = (sigma**2 + self.denoiser.sigma_data**2).rsqrt()
        sigma, x = sigma.view(-1, 1, 1, 1), z.double() / scale.view(-1, 1, 1, 1)
        mean = torch.tensor(MEANS)[y].view(-1, 1, 1, 1) if y is not None else MEANS[-1]
        x0 = mean + STD**2 / (STD**2 + sigma**2) * (x - mean)
        noise = (x - x0) / sigma
        raw = self.denoiser.target(x0, noise, sigma.flatten())
        return torch.cat([raw, *[torch.zeros_like(raw)] * (self.outputs - 1)], 1).float()


def build(schedule, prediction: str, conditional: bool = True, **options) -> LatentDiffusion:
    denoiser = Denoiser(schedule, prediction, **options)
    network = BestNetwork(denoiser, outputs=2 if denoiser.learned_variance else 1)
    conditioner = Conditioner([ClassLabel(3)]) if conditional else None
    return LatentDiffusion(IdentityFirstStage(2), network, denoiser, conditioner, image_size=(4, 8))


MODELS = {
    "flow": lambda **k: build(FlowSchedule(), "flow", **k),
    "eps": lambda **k: build(DiscreteSchedule("linear", linear_start=0.0015, linear_end=0.0195), "eps", **k),
    "v cosine": lambda **k: build(DiscreteSchedule("cosine"), "v", **k),
    "v zero terminal": lambda **k: build(DiscreteSchedule("linear", zero_terminal_snr=True), "v", **k),
    "edm": lambda **k: build(EDMSchedule(), "edm", **k),
}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_fits_every_schedule(model, sampler):
    """Mean and deviation of the data come out, at the default spacing and a usual number of steps."""
    labels = LABELS.repeat(100)
    z = sample(model, cond={"vector": labels}, sampler=sampler, steps=50, seed=1)
    error = z - torch.tensor(MEANS)[labels].view(-1, 1, 1, 1)
    assert abs(error.mean().item()) < 0.03  # 25600 numbers: their mean is known to 0.003
    # Steps of order 1 lose some of the width, the most where they draw their noise anew.
    lost = {"ddpm": 0.15, "ddim": 0.08, "euler": 0.08}.get(sampler, 0.03)
    assert abs(error.std().item() / STD - 1) < lost


@pytest.mark.parametrize("name", MODELS)
def test_guidance_moves_the_mean(name):
    """For Gaussians of one width, guidance by g is the Gaussian around u + g (c - u)."""
    model = MODELS[name]()
    labels = LABELS.repeat(50)
    for guidance in (0.0, 1.0, 2.5):
        z = sample(model, cond={"vector": labels}, sampler="euler", steps=50, guidance=guidance)
        means = MEANS[-1] + guidance * (torch.tensor(MEANS)[labels] - MEANS[-1])
        assert abs((z.mean((1, 2, 3)) - means).mean().item()) < 0.05
        assert (z.mean((1, 2, 3)) - means).abs().max().item() < 0.6


def test_guidance_costs_one_batch_of_twice_the_size():
    model = MODELS["flow"]()
    sample(model, cond={"vector": LABELS}, steps=3, guidance=2.0)
    assert model.network.batches == [8, 8, 8]
    model.network.batches.clear()
    sample(model, cond={"vector": LABELS}, steps=3)
    assert model.network.batches == [4, 4, 4]


def test_guidance_in_an_interval_of_sigma():
    model = MODELS["flow"]()
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    guided = sample(model, cond={"vector": LABELS}, sigmas=sigmas, guidance=2.0, interval=(1.0, 4.0))
    assert model.network.batches == [4, 8, 8, 4]
    whole = sample(model, cond={"vector": LABELS}, sigmas=sigmas, guidance=2.0, interval=(0.5, 100.0))
    assert torch.equal(whole, sample(model, cond={"vector": LABELS}, sigmas=sigmas, guidance=2.0))
    assert not torch.allclose(whole, guided)
    nowhere = sample(model, cond={"vector": LABELS}, sigmas=sigmas, guidance=2.0, interval=(50.0, 60.0))
    assert torch.equal(nowhere, sample(model, cond={"vector": LABELS}, sigmas=sigmas))


def test_uncond_that_is_given_is_used():
    model = MODELS["flow"]()
    cond, other = {"vector": LABELS}, {"vector": torch.full((4,), 2)}
    default = sample(model, cond=cond, guidance=3.0, steps=5)
    assert torch.equal(
        default, sample(model, cond=cond, uncond={"vector": torch.full((4,), 3)}, guidance=3.0, steps=5)
    )
    assert not torch.allclose(default, sample(model, cond=cond, uncond=other, guidance=3.0, steps=5))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_slice_is_part_of_the_whole(sampler):
    model = MODELS["eps"]()
    cond = {"vector": LABELS.repeat(2)}
    whole = sample(model, 8, cond, sampler=sampler, steps=4, guidance=2.0, seed=3)
    for start, stop in ((0, 1), (1, 4), (5, 8)):
        part = {"vector": cond["vector"][start:stop]}
        z = sample(
            model, stop - start, part, sampler=sampler, steps=4, guidance=2.0, seed=3, first_index=start
        )
        assert torch.allclose(z, whole[start:stop], atol=1e-5)
    other = sample(model, 8, cond, sampler=sampler, steps=4, guidance=2.0, seed=4)
    assert not torch.allclose(other, whole, atol=0.1)


def test_noise_that_is_given():
    model = MODELS["eps"]()
    noise = normal(7, "sample", torch.arange(4), (2, 4, 8))
    given = sample(model, noise=noise, cond={"vector": LABELS}, steps=3)
    assert torch.equal(given, sample(model, cond={"vector": LABELS}, steps=3, seed=7))
    with pytest.raises(ValueError, match=r"noise must be \(4, 2, 4, 8\), got \(4, 2, 8, 8\)"):
        sample(model, noise=torch.zeros(4, 2, 8, 8), cond={"vector": LABELS})


def test_another_latent_shape():
    z = sample(MODELS["flow"](), cond={"vector": LABELS}, steps=2, latent_shape=(2, 6, 6))
    assert z.shape == (4, 2, 6, 6)


def test_eta_and_options():
    model = MODELS["eps"]()
    cond = {"vector": LABELS}
    plain = sample(model, cond=cond, sampler="ddim", steps=5)
    assert torch.equal(plain, sample(model, cond=cond, sampler="ddim", steps=5, eta=0.0))
    assert not torch.allclose(plain, sample(model, cond=cond, sampler="ddim", steps=5, eta=1.0), atol=0.01)
    ancestral = sample(model, cond=cond, sampler="ddpm", steps=5)
    assert torch.allclose(ancestral, sample(model, cond=cond, sampler="ddim", steps=5, eta=1.0), atol=1e-4)
    assert not torch.equal(ancestral, sample(model, cond=cond, sampler="ddpm", steps=5, variance="large"))


def test_a_learned_variance_is_used_by_ddpm_alone():
    model = build(DiscreteSchedule(), "eps", learned_variance=True)
    cond = {"vector": LABELS}
    learned = sample(model, cond=cond, sampler="ddpm", steps=5)
    assert torch.equal(learned, sample(model, cond=cond, sampler="ddpm", steps=5, variance="learned"))
    assert not torch.equal(learned, sample(model, cond=cond, sampler="ddpm", steps=5, variance="small"))
    for sampler in SAMPLERS:
        assert sample(model, cond=cond, sampler=sampler, steps=3).shape == (4, 2, 4, 8)


def test_callback_sees_every_step():
    seen = []
    sample(
        MODELS["flow"](),
        cond={"vector": LABELS},
        steps=4,
        callback=lambda i, x, x0, sigma: seen.append((i, x0.shape, float(sigma))),
    )
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [s for _, _, s in seen] == pytest.approx(FlowSchedule().sigmas(4)[:-1].tolist())


def test_unconditional():
    model = MODELS["eps"](conditional=False)
    z = sample(model, 300, steps=50)
    assert abs(z.mean().item() - MEANS[-1]) < 0.03
    with pytest.raises(ValueError, match="guidance=2.0 needs a condition"):
        sample(model, 2, guidance=2.0)


def test_requests_that_contradict_themselves():
    model = MODELS["flow"]()
    cond = {"vector": LABELS}
    with pytest.raises(ValueError, match="got none of them"):
        sample(model)
    with pytest.raises(ValueError, match=r"must agree, got \[3, 4\]"):
        sample(model, 3, cond)
    with pytest.raises(ValueError, match="at least 1"):
        sample(MODELS["flow"](conditional=False), 0)
    with pytest.raises(ValueError, match="'eulr' is unknown; there are ddpm, ddim"):
        sample(model, cond=cond, sampler="eulr")
    with pytest.raises(ValueError, match="eta belongs to the ddim sampler, not to euler"):
        sample(model, cond=cond, eta=0.5)
    with pytest.raises(ValueError, match="conditioned on label"):
        sample(model, 4)
    with pytest.raises(ValueError, match="scale is nan"):
        sample(model, cond=cond, guidance=float("nan"))
    with pytest.raises(ValueError, match="spacing is 'karras', must be one of uniform"):
        sample(model, cond=cond, spacing="karras")
    with pytest.raises(ValueError, match="from 1 to the schedule's 1000"):
        sample(MODELS["eps"](), cond=cond, steps=1001)


def test_no_absent_class_to_guide_by():
    conditioner = Conditioner([ClassEmbedder(3, 4, drop=0.0, null_class=False)])
    denoiser = Denoiser(FlowSchedule(), "flow")
    model = LatentDiffusion(IdentityFirstStage(2), BestNetwork(denoiser), denoiser, conditioner, image_size=4)
    with pytest.raises(ValueError, match="explicit `uncond`"):
        sample(model, cond=conditioner({"label": LABELS}), guidance=2.0)


def test_default_spacing():
    linear, cosine = DiscreteSchedule(), DiscreteSchedule("cosine")
    assert {default_spacing(linear, s) for s in SAMPLERS if s != "dpmpp_2m"} == {"linspace"}
    assert default_spacing(linear, "dpmpp_2m") == "karras"
    assert default_spacing(cosine, "dpmpp_2m") == "trailing"
    assert default_spacing(FlowSchedule(), "dpmpp_2m") is default_spacing(EDMSchedule(), "euler") is None
    for steps in (1, 7, 30, 999, 1000):  # exactly as many as asked for, whatever divides what
        for sampler in SAMPLERS:
            for schedule in (linear, cosine):
                sigmas = sampling_sigmas(Denoiser(schedule), steps, sampler=sampler)
                assert len(sigmas) == steps + 1
                assert sigmas[0].item() == pytest.approx(schedule.sigmas_all[-1].item(), rel=1e-12)
                assert sigmas[-1] == 0
    every = sampling_sigmas(Denoiser(linear), 1000, sampler="ddpm")
    assert torch.equal(every[:-1], linear.sigmas_all.flip(0))


class Halves(IdentityFirstStage):
    """A first stage of known moments: a factor of 2, mean 3 x, deviation 0.1."""

    downsampling_factor = 2

    def __init__(self):
        super().__init__(2)
        self.downsampling_factor = 2

    def moments(self, x):
        small = 3 * x[..., ::2, ::2]
        return small, torch.full_like(small, 0.1)

    def decode_latent(self, z):
        return (z / 3).repeat_interleave(2, -1).repeat_interleave(2, -2)


def halves(**options) -> LatentDiffusion:
    denoiser = Denoiser(FlowSchedule(), "flow")
    return LatentDiffusion(Halves(), BestNetwork(denoiser), denoiser, image_size=[8, 4], **options)


def test_shift_and_scale_of_the_latent():
    model = halves(latent_shift=[1.0, 2.0], latent_scale=0.5)
    assert model.latent_shape == (2, 4, 2)
    image = torch.rand(3, 2, 4, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    z = model.to_latent(image)
    expected = (3 * image[..., ::2, ::2] - torch.tensor([1.0, 2.0]).view(2, 1, 1)) * 0.5
    assert torch.allclose(z, expected)
    assert torch.allclose(model.to_image(z), image, atol=1e-6)
    noise = torch.ones_like(z)
    assert torch.allclose(model.to_latent(image, noise), expected + 0.05)
    assert torch.allclose(model.denormalize(model.normalize(z)), z, atol=1e-6)


def test_published_names():
    denoiser = Denoiser(FlowSchedule(), "flow")
    first_stage, network = IdentityFirstStage(2), BestNetwork(denoiser)
    first_stage.weight, network.weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    model = LatentDiffusion(first_stage, network, denoiser, image_size=4)
    names = ["latent_scale", "latent_shift", "first_stage_model.weight", "model.diffusion_model.weight"]
    assert sorted(model.state_dict()) == sorted(names)


def test_parts_that_do_not_fit():
    flow = Denoiser(FlowSchedule(), "flow")
    network = BestNetwork(flow)
    with pytest.raises(ValueError, match="5x4 is not a multiple"):
        LatentDiffusion(Halves(), network, flow, image_size=[5, 4])
    with pytest.raises(ValueError, match="returns 2 channels.* have 3"):
        LatentDiffusion(IdentityFirstStage(3), network, flow, image_size=4)
    with pytest.raises(ValueError, match="out_channels must be 4"):
        LatentDiffusion(IdentityFirstStage(2), network, Denoiser(FlowSchedule(), "flow", True), image_size=4)
    with pytest.raises(ValueError, match="latent_scale has 3 values"):
        halves(latent_scale=[1.0, 2.0, 3.0])
    for value in (0.0, float("nan"), [1.0, 0.0]):
        with pytest.raises(ValueError, match="latent_scale must be finite"):
            halves(latent_scale=value)
    for size in ([8, 8, 8], 0, [8, -2], 8.0):
        with pytest.raises((ValueError, TypeError)):
            LatentDiffusion(IdentityFirstStage(2), network, flow, image_size=size)
    wide = BestNetwork(flow)
    wide.in_channels = 5
    with pytest.raises(ValueError, match="takes 5 channels"):
        LatentDiffusion(IdentityFirstStage(2), wide, flow, image_size=4)


def test_public_names():
    assert ldm.sample is sample
    assert ldm.load.__name__ == "load"
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        ldm.sampel  # noqa: B018
