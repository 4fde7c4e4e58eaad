"""Schedules against their papers' equations and the original's timesteps."""

import math
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from reference_data import load_cases, relative_error

from ldm.diffusion.schedule import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    karras_sigmas,
    make_betas,
    resolution_shift,
    respaced_timesteps,
    shift_time,
)

LDM = DiscreteSchedule("linear", 1000, 0.0015, 0.0195)
ALL = {
    "linear": LDM,
    "sqrt_linear": DiscreteSchedule("sqrt_linear"),
    "cosine": DiscreteSchedule("cosine"),
    "sqrt": DiscreteSchedule("sqrt", 1000, 1e-6, 1e-3),
    "zero_terminal": DiscreteSchedule(linear_start=0.00085, linear_end=0.012, zero_terminal_snr=True),
    "short": DiscreteSchedule(betas=[0.1, 0.2, 0.5]),
    "flow": FlowSchedule(),
    "edm": EDMSchedule(),
}
DISCRETE = [name for name, schedule in ALL.items() if isinstance(schedule, DiscreteSchedule)]


def test_betas_follow_their_names():
    start, end, middle = 0.01, 0.25, 50
    betas = {name: make_betas(name, 101, start, end, 0.008) for name in ("linear", "sqrt_linear", "sqrt")}
    assert [b[0].item() for b in betas.values()] == pytest.approx([start, start, math.sqrt(start)])
    assert [b[-1].item() for b in betas.values()] == pytest.approx([end, end, math.sqrt(end)])
    assert betas["linear"][middle].item() == pytest.approx(0.3**2)  # the mean of 0.1 and 0.5, squared
    assert betas["sqrt_linear"][middle].item() == pytest.approx(0.13)
    assert betas["sqrt"][middle].item() == pytest.approx(math.sqrt(0.13))


def test_cosine_is_equation_17():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = ALL["cosine"]
    for t in (0, 1, 500, 900, 997):
        assert schedule.alphas_cumprod[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("name", DISCRETE)
def test_the_attributes_agree(name):
    schedule = ALL[name]
    for tensor in (schedule.betas, schedule.alphas_cumprod, schedule.sigmas_all):
        assert tensor.dtype == torch.float64 and tensor.shape == (schedule.timesteps,)
    torch.testing.assert_close(
        (1 - schedule.betas).cumprod(0), schedule.alphas_cumprod, rtol=1e-6, atol=1e-16
    )
    torch.testing.assert_close(1 / (1 + schedule.sigmas_all**2), schedule.alphas_cumprod, rtol=1e-9, atol=0)
    assert pickle.loads(pickle.dumps(schedule)).sigmas_all.equal(schedule.sigmas_all)


def test_tables_are_real_when_a_model_is_built_without_memory():
    with torch.device("meta"):
        built = DiscreteSchedule("linear", 1000, 0.0015, 0.0195), DiscreteSchedule("cosine"), FlowSchedule()
        sigmas = [schedule.sigmas(4) for schedule in built]
    for schedule, expected, found in zip(built, (LDM, ALL["cosine"], ALL["flow"]), sigmas, strict=True):
        assert found.equal(expected.sigmas(4)) and schedule.time(3.0) == expected.time(3.0)


def test_sampling_may_start_from_half_precision_noise():
    noise = torch.ones(2, 3, dtype=torch.float16)
    assert ALL["flow"].start(noise, 1e6).equal(torch.full((2, 3), 1e6))


def test_given_betas_are_copied():
    betas = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    DiscreteSchedule(betas=betas, zero_terminal_snr=True)
    assert betas.tolist() == [0.1, 0.2, 0.3]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(ALL)), st.floats(0.0, 1.0))
def test_time_inverts_sigma(name, unit):
    schedule = ALL[name]
    if name == "flow":
        t = 999.9 * unit  # at 1000, sigma_max stands for infinity
    elif name == "edm":
        t = 4 * unit - 2
    else:
        t = (schedule.timesteps - 1) * unit
    assert schedule.time(schedule.sigma(t)).item() == pytest.approx(t, rel=1e-9, abs=1e-8)


@pytest.mark.parametrize("name", DISCRETE)
def test_whole_times_are_exact(name):
    schedule = ALL[name]
    t = torch.arange(schedule.timesteps)
    assert schedule.sigma(t).equal(schedule.sigmas_all)
    assert schedule.time(schedule.sigmas_all).equal(t.double())
    # A sigma that went through float32 still means the same step, as far as float32 can say.
    torch.testing.assert_close(schedule.time(schedule.sigmas_all.float()), t.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", DISCRETE)
def test_sigmas_beyond_the_table_are_its_ends(name):
    schedule = ALL[name]
    assert schedule.time(0.0) == 0 and schedule.time(1e-9) == 0
    assert schedule.time(1e9) == schedule.timesteps - 1
    assert schedule.sigma(-3.0) == schedule.sigmas_all[0] and schedule.sigma(1e6) == schedule.sigmas_all[-1]


def test_scales_are_the_forward_process():
    sigma = LDM.sigmas_all
    torch.testing.assert_close(LDM.scale(sigma), LDM.alphas_cumprod.sqrt())  # sqrt(a) x0
    torch.testing.assert_close(LDM.scale(sigma) * sigma, (1 - LDM.alphas_cumprod).sqrt())  # sqrt(1 - a) noise
    t = torch.linspace(0, 0.99, 12, dtype=torch.float64)
    flow = ALL["flow"]
    torch.testing.assert_close(flow.scale(flow.sigma(1000 * t)), 1 - t)
    torch.testing.assert_close(flow.scale(flow.sigma(1000 * t)) * flow.sigma(1000 * t), t)


def test_sampling_starts_from_what_the_model_expects():
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for name in ("linear", "flow"):
        schedule = ALL[name]
        sigma = schedule.sigmas(10)[0]
        x = schedule.start(noise, sigma)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x * schedule.scale(sigma), noise, rtol=2e-6, atol=0)
    assert ALL["edm"].start(noise, 80.0).equal(80 * noise)


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 30, 50, 100, 200, 250, 500])
def test_uniform_timesteps_are_the_originals(steps):
    expected = [t + 1 for t in range(0, 1000, 1000 // steps)]
    if expected[-1] > 999:
        with pytest.raises(ValueError, match="run past the last of 1000"):
            LDM.sigmas(steps, "uniform")
        return
    if len(expected) == steps:
        sigmas = LDM.sigmas(steps, "uniform")
    else:
        with pytest.warns(UserWarning, match=f"gives {len(expected)} steps for {steps}"):
            sigmas = LDM.sigmas(steps, "uniform")
    assert LDM.time(sigmas).tolist() == [*expected[::-1], 0]
    assert sigmas[-1] == LDM.sigmas_all[0] > 0


def test_uniform_steps_past_the_end_are_refused():
    for steps in (300, 333, 999, 1000):
        with pytest.raises(ValueError, match="run past the last"):
            LDM.sigmas(steps, "uniform")


@pytest.mark.filterwarnings("ignore:quad spacing gives")
def test_quad_timesteps_are_the_originals():
    for steps in range(1, 201):
        expected = (np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2).astype(int) + 1
        assert LDM.time(LDM.sigmas(steps, "quad")).tolist() == [*np.unique(expected)[::-1], 0], steps


def test_quad_timesteps_that_fall_together_are_told():
    with pytest.warns(UserWarning, match="quad spacing gives 96 steps for 100"):
        assert len(LDM.sigmas(100, "quad")) == 97


def test_other_timesteps():
    assert LDM.time(LDM.sigmas(4, "trailing"))[:-1].tolist() == [999, 749, 499, 249]
    assert LDM.time(LDM.sigmas(3, "trailing"))[:-1].tolist() == [999, 666, 332]
    assert LDM.time(LDM.sigmas(4, "leading"))[:-1].tolist() == [750, 500, 250, 0]
    torch.testing.assert_close(
        LDM.time(LDM.sigmas(4, "linspace"))[:-1], torch.tensor([999.0, 666, 333, 0], dtype=torch.float64)
    )
    karras = LDM.sigmas(4, "karras")
    assert LDM.time(karras[:-1])[0].item() == pytest.approx(999) and LDM.time(karras[-2]).item() < 1e-6


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(DISCRETE), st.sampled_from(("trailing", "leading", "linspace", "karras")), st.data())
def test_sequences_fall_to_zero_in_as_many_steps_as_asked(name, spacing, data):
    schedule = ALL[name]
    steps = data.draw(st.integers(1, schedule.timesteps))
    sigmas = schedule.sigmas(steps, spacing)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0
    if spacing != "leading":
        assert sigmas[0].item() == pytest.approx(schedule.sigmas_all[-1].item(), rel=1e-9)


def test_all_timesteps_are_the_table():
    for spacing in ("trailing", "leading", "linspace"):
        sigmas = LDM.sigmas(1000, spacing)
        torch.testing.assert_close(sigmas[:-1].flip(0), LDM.sigmas_all, rtol=1e-9, atol=0)


def test_karras_sigmas_are_those_of_k_diffusion():
    expected = load_cases("k-samplers")["sigmas_karras"]
    assert relative_error(karras_sigmas(9, 0.02, 20.0), expected) < 1e-6
    assert EDMSchedule().sigmas(18)[0].item() == pytest.approx(80)
    assert EDMSchedule().sigmas(18)[-2].item() == pytest.approx(0.002)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.floats(0.2, 20))
def test_flow_steps_are_uniform_in_shifted_time(steps, shift):
    flow = FlowSchedule()
    sigmas = flow.sigmas(steps, shift=shift)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    expected = 1000 * shift_time(t, shift)
    expected[0] = 999.999  # sigma_max
    torch.testing.assert_close(flow.time(sigmas), expected, rtol=1e-9, atol=1e-9)
    assert sigmas[0] == 1e6 and sigmas[-1] == 0


@settings(deadline=None)
@given(st.floats(1e-3, 0.999), st.floats(0.1, 50), st.floats(0.1, 50))
def test_shift_scales_sigma(t, a, b):
    shifted = shift_time(t, a)
    assert shifted / (1 - shifted) == pytest.approx(a * t / (1 - t), rel=1e-6)
    assert shift_time(shifted, b) == pytest.approx(shift_time(t, a * b), rel=1e-6)


def test_resolution_shift():
    assert resolution_shift(16, 16, 16) == 1 and resolution_shift(4, 64, 64) == 2


def test_training_draws_every_step_equally_often():
    unit = (torch.arange(40_000) + 0.5) / 40_000
    t = LDM.time(LDM.draw(unit)).round().long()
    assert torch.bincount(t, minlength=1000).tolist() == [40] * 1000
    assert LDM.draw(torch.tensor([0.0, 1.0])).tolist() == LDM.sigmas_all[[0, -1]].tolist()
    torch.testing.assert_close(
        ALL["flow"].draw(torch.tensor([0.25, 0.5])), torch.tensor([1 / 3, 1.0]).double()
    )


def test_zero_terminal_snr():
    plain = DiscreteSchedule(linear_start=0.00085, linear_end=0.012)
    root, expected = ALL["zero_terminal"].alphas_cumprod.sqrt(), plain.alphas_cumprod.sqrt()
    assert root[0].item() == pytest.approx(expected[0].item()) and root[-1].item() == pytest.approx(1e-6)
    a, z = expected[0], expected[-1]
    torch.testing.assert_close(root[1:-1], ((expected - z) * a / (a - z))[1:-1])
    sigmas = ALL["zero_terminal"].sigmas(10)
    assert sigmas[0].item() == pytest.approx(1e6) and ALL["zero_terminal"].time(sigmas)[0] == 999


def test_respaced_timesteps():
    assert respaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps(300, "10,15,20")[:3] == [0, 11, 22]
    chosen = respaced_timesteps(300, "10,15,20")
    assert [sum(low <= t < low + 100 for t in chosen) for low in (0, 100, 200)] == [10, 15, 20]
    assert {0, 99, 100, 199, 200, 299} <= set(chosen)
    assert respaced_timesteps(1000, "1000") == list(range(1000))
    assert respaced_timesteps(10, "1,1") == [0, 5]
    for spec in ("ddim300", "1001", "600,10", "0"):
        with pytest.raises(ValueError, match="respacing"):
            respaced_timesteps(1000, spec)


def test_original_buffers():
    """The tables' definitions, from betas alone (DDPM, eqs. 4, 6 and 7), step by step."""
    tables = {k: v.double() for k, v in LDM.buffers_like_original().items()}
    assert len(tables) == 12 and all(v.dtype == torch.float32 for v in LDM.buffers_like_original().values())
    kept = 1.0
    for t, beta in enumerate(LDM.betas.tolist()[:50]):
        before, kept = kept, kept * (1 - beta)
        expected = {
            "alphas_cumprod": kept,
            "alphas_cumprod_prev": before,
            "sqrt_recipm1_alphas_cumprod": math.sqrt(1 / kept - 1),
            "posterior_variance": (1 - before) / (1 - kept) * beta,
            "posterior_mean_coef1": math.sqrt(before) * beta / (1 - kept),
            "posterior_mean_coef2": math.sqrt(1 - beta) * (1 - before) / (1 - kept),
        }
        for name, value in expected.items():
            assert tables[name][t].item() == pytest.approx(value, rel=1e-6, abs=1e-12), (name, t)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DiscreteSchedule("quadratic"), "schedule is 'quadratic', must be one of linear"),
        (lambda: DiscreteSchedule(betas=[0.1, 1.0]), r"numbers in \(0, 1\)"),
        (lambda: DiscreteSchedule(betas=[0.1]), "at least 2"),
        (lambda: DiscreteSchedule(betas=[0.9] * 20), "zero_terminal_snr=True"),
        (lambda: LDM.sigmas(0), "steps is 0"),
        (lambda: LDM.sigmas(1001), "1000 timesteps"),
        (lambda: LDM.sigmas(10, "even"), "spacing is 'even'"),
        (lambda: FlowSchedule().sigmas(10, "karras"), "spacing is 'karras'"),
        (lambda: FlowSchedule().sigmas(0), "must be at least 1"),
        (lambda: FlowSchedule(sigma_max=0), "sigma_max is 0"),
        (lambda: EDMSchedule(1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: EDMSchedule().sigmas(4, "uniform"), "spacing is 'uniform'"),
    ],
)
def test_errors_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
