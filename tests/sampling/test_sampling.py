"""`sample` and `draw`, on Gaussian data whose best network is known in closed form, and their settings."""

import sys
from dataclasses import asdict, replace

import pytest
import torch
from gaussian_models import LABELS, MEANS, MODELS, STD, BestNetwork, build

import ldm
from ldm.conditioning import ClassEmbedder, Conditioner
from ldm.config import ConfigError, check_section
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.random import normal
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, resolution_shift
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage
from ldm.sampling import Sampling, draw, sample
from ldm.sampling.spacing import default_spacing, sampling_sigmas


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


# Settings, and the model's own


def described(model: LatentDiffusion, **sampling) -> LatentDiffusion:
    model.description = {"sampling": sampling}
    return model


def test_a_model_is_sampled_with_its_own_settings_where_none_are_given():
    model, cond = MODELS["eps"](), {"vector": LABELS}
    plain = sample(model, cond=cond)
    assert torch.equal(plain, sample(model, cond=cond, sampler="euler", steps=30, guidance=1.0))
    described(model, sampler="ddim", steps=4, guidance=2.0, spacing="quad", options={"eta": 0.5})
    said = {"sampler": "ddim", "steps": 4, "guidance": 2.0, "spacing": "quad", "eta": 0.5}
    own = sample(model, cond=cond)
    assert not torch.allclose(plain, own)
    assert torch.equal(own, sample(MODELS["eps"](), cond=cond, **said))
    changed = sample(model, cond=cond, steps=5, eta=0.0)
    assert torch.equal(changed, sample(MODELS["eps"](), cond=cond, **{**said, "steps": 5, "eta": 0.0}))
    # Another sampler gets neither the option nor the spacing of the model's own.
    other = sample(model, cond=cond, sampler="heun")
    assert torch.equal(other, sample(MODELS["eps"](), cond=cond, sampler="heun", steps=4, guidance=2.0))


def test_settings_that_are_given_whole_are_taken_as_they_are():
    model, cond = described(MODELS["eps"](), sampler="ddim", steps=4, spacing="quad"), {"vector": LABELS}
    given = sample(model, cond=cond, settings=Sampling(sampler="ddim", steps=3))
    assert torch.equal(given, sample(MODELS["eps"](), cond=cond, sampler="ddim", steps=3))
    with pytest.raises(ValueError, match="settings are given, and steps, eta besides"):
        sample(model, cond=cond, settings=Sampling(), steps=3, eta=0.5)


def test_a_models_own_guidance_needs_something_to_guide_by():
    model = described(MODELS["eps"](conditional=False), guidance=3.0)
    assert torch.equal(sample(model, 2, steps=2), sample(model, 2, steps=2, guidance=1.0))
    with pytest.raises(ValueError, match="guidance=3.0 needs a condition"):
        sample(model, 2, steps=2, guidance=3.0)


def test_files_that_have_eta_beside_the_sampler():
    """As configs and descriptions had it before samplers had `options`; it is written there now."""
    for old in ({"eta": 0.5}, {"options": {"eta": 0.5}}):
        settings = check_section({"sampler": "ddim", **old}, Sampling)
        assert asdict(settings)["options"] == {"eta": 0.5} and "eta" not in asdict(settings)
        model = described(MODELS["eps"](), sampler="ddim", **old)
        assert Sampling.of(model) == settings
        assert Sampling.of(model, eta=1.0).options == {"eta": 1.0}
        assert Sampling.of(model, "plms").options == {}
    assert check_section({"eta": None}, Sampling) == Sampling()
    assert Sampling.of(described(MODELS["eps"](), sampler="euler", eta=None)) == Sampling()
    assert replace(Sampling("ddim", eta=0.5), steps=3).options == {"eta": 0.5}


@pytest.mark.parametrize(
    "sampler, options, message",
    [
        ("ddim", {"etta": 0.5}, "etta is no option of ddim, which takes eta; did you mean eta"),
        ("euler", {"etta": 0.5}, "etta is no option of euler, which takes no options of its own"),
        ("ddim", {"variance": "large"}, "variance belongs to the ddpm sampler, not to ddim, which takes eta"),
        ("euler", {"flow_time": True}, "flow_time belongs to the plms and heun sampler, not to euler"),
        ("ddim", {"eta": "much"}, "eta of the sampler ddim: expected float, got 'much'"),
        ("ddim", {"eta": 1.5}, "eta must be in .0, 1., got 1.5"),
        ("ddpm", {"variance": "huge"}, "variance .*'huge'.* small.* large.* learned"),
    ],
)
def test_options_are_held_against_the_sampler(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(sampler, options=options)
    with pytest.raises(ValueError, match=message):
        sample(MODELS["eps"](), cond={"vector": LABELS}, sampler=sampler, **options)
    with pytest.raises(ConfigError, match=message):
        check_section({"sampler": sampler, "options": options}, Sampling)


@pytest.mark.parametrize("values", [{"steps": 2.5}, {"sampler": None}, {"options": [1]}, {"sigma_max": 80}])
def test_a_description_is_held_against_the_settings(values):
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(values))}"):
        Sampling.of(described(MODELS["eps"](), **values))


def test_shift_auto_follows_from_the_latents():
    model, cond = MODELS["flow"](), {"vector": LABELS}
    shift = resolution_shift(*model.latent_shape)
    auto = sample(model, cond=cond, steps=3, shift="auto")
    assert torch.equal(auto, sample(model, cond=cond, steps=3, shift=shift))
    assert not torch.equal(auto, sample(model, cond=cond, steps=3))


# Samplers of one's own

OWN = """
def half(denoise, x, sigmas, *, noise_fn=None, callback=None, share: float = 0.5):
    return share * denoise(x, sigmas[0].expand(len(x)))

def none(x):
    return x
"""


@pytest.fixture
def own_sampler(tmp_path, monkeypatch) -> str:
    (tmp_path / "their_samplers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_samplers.half"
    sys.modules.pop("their_samplers", None)


def test_a_new_sampler_is_one_function(monkeypatch):
    """Its option is at once a key of YAML and a keyword of `sample`."""

    def churned(denoise, x, sigmas, *, noise_fn=None, callback=None, churn: int = 0):
        return torch.full_like(x, churn)

    monkeypatch.setitem(SAMPLERS, "churned", churned)
    settings = check_section({"sampler": "churned", "options": {"churn": 3}}, Sampling)
    model, cond = MODELS["flow"](), {"vector": LABELS}
    assert sample(model, cond=cond, settings=settings).eq(3).all()
    assert sample(model, cond=cond, sampler="churned", churn=2).eq(2).all()
    with pytest.raises(ValueError, match="churn of the sampler churned: expected int"):
        Sampling("churned", options={"churn": 0.5})


def test_a_sampler_by_its_dotted_path(own_sampler):
    model, cond = MODELS["flow"](), {"vector": LABELS}
    whole = sample(model, cond=cond, sampler=own_sampler, share=1.0)
    half = sample(model, cond=cond, settings=check_section({"sampler": own_sampler}, Sampling))
    assert torch.equal(2 * half, whole) and whole.abs().sum() > 0
    with pytest.raises(ValueError, match="shaer is no option of their_samplers.half, which takes share; did"):
        Sampling(own_sampler, options={"shaer": 1.0})
    with pytest.raises(ValueError, match="their_samplers.none must take .denoise, x, sigmas"):
        Sampling("their_samplers.none")
    with pytest.raises(ValueError, match="their_samplers has no 'halv'; did you mean their_samplers.half"):
        Sampling("their_samplers.halv")
    with pytest.raises(ValueError, match="inside ldm it must be a class"):
        Sampling("ldm.files.sync_folder")


def test_a_file_of_weights_alone_names_no_code(own_sampler):
    model, cond = described(MODELS["flow"](), sampler=own_sampler, options={"share": 1.0}), {"vector": LABELS}
    for attempt in (lambda: sample(model, cond=cond), lambda: draw(model, conditions={"label": LABELS})):
        with pytest.raises(ValueError, match="their_samplers.half is code outside ldm"):
            attempt()
    sample(model, cond=cond, sampler="euler", steps=1)
    assert "their_samplers" not in sys.modules
    named = sample(model, cond=cond, sampler=own_sampler)
    model.trusted = {own_sampler}  # as `ldm.load` has it from a YAML that was given
    assert torch.equal(sample(model, cond=cond), named)
    assert torch.equal(named, sample(MODELS["flow"](), cond=cond, sampler=own_sampler, share=1.0))


# Drawing


def test_draw_gives_what_sample_gives():
    model = MODELS["eps"]()
    labels = LABELS.repeat(5)
    said = {"sampler": "ddpm", "steps": 3, "guidance": 2.0}
    images = torch.cat(list(draw(model, conditions={"label": labels}, seed=4, **said)))
    z = torch.cat(
        [
            sample(model, 16, {"vector": label}, seed=4, first_index=16 * i, **said)
            for i, label in enumerate((labels[:16], torch.cat([labels[16:], labels[-1:].repeat(12)])))
        ]
    )
    assert torch.equal(images, model.to_image(z)[:20])

    def asked(indices):
        return {"label": labels[indices]}

    for size in (1, 7, 64):
        settings = Sampling(**said)
        drawn = list(ldm.draw(model, 20, asked, seed=4, settings=settings, batch_size=size))
        assert [len(batch) for batch in drawn] == [16, 4]
        assert torch.equal(torch.cat(drawn), images)
    loose = list(draw(model, 20, asked, seed=4, batch_size=7, exact=False, **said))
    assert [len(batch) for batch in loose] == [7, 7, 6]
    assert torch.allclose(torch.cat(loose), images, atol=1e-4)


def test_draw_without_conditions_and_its_progress(capsys):
    model, seen = MODELS["flow"](conditional=False), []
    for images in draw(model, 20, steps=2, progress=lambda *done: seen.append(done)):
        assert images.shape[1:] == (2, 4, 8) and images.dtype == torch.float32
    assert seen == [(16, 20), (20, 20)]
    list(draw(model, 20, steps=2, progress=True))
    assert "20/20" in capsys.readouterr().err


def test_draw_refuses_before_it_draws():
    model, alone = MODELS["flow"](), MODELS["flow"](conditional=False)
    for arguments, message in (
        ((model, 4), "conditions are missing, and this model is conditioned on label"),
        ((alone, 4, {"label": LABELS}), "conditions were given, and this model is conditioned on nothing"),
        ((model, 3, {"label": LABELS}), r"must agree, got \[3, 4\]"),
        ((model, None, lambda indices: {}), "got none of them"),
        ((model.network, 4), "a LatentDiffusion can be sampled, not a BestNetwork alone"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(*arguments)
    with pytest.raises(ValueError, match="spacing is 'karras', must be one of uniform"):
        draw(alone, 4, spacing="karras")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        draw(alone, 4, batch_size=0)
    with pytest.raises(ValueError, match="stpes is no option of euler, .*; did you mean steps"):
        draw(alone, 4, stpes=3)


def test_memory_that_does_not_suffice_and_images_that_are_not_finite():
    model = MODELS["flow"](conditional=False)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    model.network.forward = full
    with pytest.raises(ValueError, match="memory does not hold 16 images at a time .tried to allocate"):
        list(draw(model, 3))
    model.network.forward = lambda z, t, **cond: z * torch.nan
    with pytest.raises(ValueError, match="images 0 to 2 are not finite"):
        list(draw(model, 3))


def test_public_names():
    assert ldm.sample is sample and ldm.draw is draw
    assert ldm.load.__name__ == "load"
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        ldm.sampel  # noqa: B018
