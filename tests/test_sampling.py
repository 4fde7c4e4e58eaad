"""`sample` and `draw`, on Gaussian data whose best network is known in closed form, and their settings."""

import pytest
import torch
from gaussian_models import LABELS, MEANS, MODELS, STD, BestNetwork, build

import ldm
from ldm.conditioning import ClassEmbedder, Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.random import normal
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule
from ldm.diffusion.spacing import default_spacing, sampling_sigmas
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage
from ldm.sampling import sample


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
    with pytest.raises(ValueError, match="guidance nan is no finite number"):
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


def test_public_names():
    assert ldm.sample is sample
    assert ldm.load.__name__ == "load"
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        ldm.sampel  # noqa: B018
