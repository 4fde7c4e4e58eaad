"""Prediction types against their definitions."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ldm.diffusion.denoiser import PREDICTIONS, Clipped, Denoiser, predict
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule

VP, FLOW, EDM = DiscreteSchedule("linear", 1000, 0.0015, 0.0195), FlowSchedule(), EDMSchedule()
SCHEDULES = {"vp": VP, "flow": FLOW, "edm": EDM}


def pair(dtype=torch.float64, batch=3):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, 2, 4, 5, dtype=dtype, generator=generator) for _ in range(2))


def column(values):
    return values.reshape(-1, 1, 1, 1)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(list(PREDICTIONS)),
    st.sampled_from(list(SCHEDULES)),
    st.lists(st.floats(-7, 7), min_size=3, max_size=3),
)
def test_the_target_is_what_gives_x0(prediction, schedule, log_sigmas):
    denoiser = Denoiser(SCHEDULES[schedule], prediction)
    x0, noise = pair()
    sigma = torch.tensor(log_sigmas, dtype=torch.float64).exp()
    x = x0 + column(sigma) * noise
    torch.testing.assert_close(
        denoiser.to_x0(denoiser.target(x0, noise, sigma), x, sigma), x0, rtol=1e-9, atol=1e-9
    )


def test_targets_are_their_definitions():
    x0, noise = pair()
    t = torch.tensor([3, 500, 999])
    a, b = column(VP.alphas_cumprod[t].sqrt()), column((1 - VP.alphas_cumprod[t]).sqrt())
    sigma = VP.sigma(t)
    assert Denoiser(VP, "eps").target(x0, noise, sigma).equal(noise)
    assert Denoiser(VP, "x0").target(x0, noise, sigma).equal(x0)
    torch.testing.assert_close(Denoiser(VP, "v").target(x0, noise, sigma), a * noise - b * x0)
    assert Denoiser(FLOW, "flow").target(x0, noise, sigma).equal(noise - x0)
    s, d = column(sigma), 0.7  # EDM, table 1: F = (x0 - c_skip x) / c_out
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
    torch.testing.assert_close(
        Denoiser(EDM, "edm", sigma_data=d).target(x0, noise, sigma), (x0 - c_skip * (x0 + s * noise)) / c_out
    )


def test_the_network_sees_its_own_scale_and_time():
    x0, noise = pair()
    t = torch.tensor([0, 17, 999])
    a = column(VP.alphas_cumprod[t])
    sigma = VP.sigma(t)
    x_in, time = Denoiser(VP, "v").network_input(x0 + column(sigma) * noise, sigma)
    torch.testing.assert_close(x_in, a.sqrt() * x0 + (1 - a).sqrt() * noise)
    assert time.equal(t.double())

    u = torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64)
    sigma = FLOW.sigma(1000 * u)
    x_in, time = Denoiser(FLOW, "flow").network_input(x0 + column(sigma) * noise, sigma)
    torch.testing.assert_close(x_in, (1 - column(u)) * x0 + column(u) * noise)
    torch.testing.assert_close(time, 1000 * u)

    sigma = torch.tensor([0.002, 1.0, 80.0])
    x_in, time = Denoiser(EDM, "edm", sigma_data=0.5).network_input(x0, sigma)
    torch.testing.assert_close(x_in, x0 / column(sigma.double() ** 2 + 0.25).sqrt())
    torch.testing.assert_close(time, sigma.double().log() / 4)


def test_edm_keeps_input_and_target_at_unit_variance():
    """What its coefficients are chosen for (EDM, appendix B.6)."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.3 * torch.randn(4, 50_000, dtype=torch.float64, generator=generator)
    noise = torch.randn(4, 50_000, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.01, 0.3, 2.0, 50.0])
    denoiser = Denoiser(EDM, "edm", sigma_data=0.3)
    x_in, _ = denoiser.network_input(x0 + sigma.double()[:, None] * noise, sigma)
    for values in (x_in, denoiser.target(x0, noise, sigma)):
        assert (values.std(1) - 1).abs().max() < 0.02


@pytest.mark.parametrize("prediction", ["v", "x0", "flow", "edm"])
def test_sigma_as_good_as_infinite_does_not_cancel(prediction):
    denoiser = Denoiser(FLOW, prediction)
    x0, noise = pair(torch.float32)
    sigma = torch.full((3,), 1e6, dtype=torch.float64)
    x = x0 + 1e6 * noise
    restored = denoiser.to_x0(denoiser.target(x0, noise, sigma), x, sigma)
    assert (restored - x0).abs().max() < 1e-5
    x_in, _ = denoiser.network_input(x, sigma)
    assert (x_in - noise).abs().max() < 2e-5


def test_a_bound_network_is_a_denoise_function():
    x0, noise = pair(torch.float32)
    sigma = VP.sigma(torch.tensor([5, 250, 900]))
    seen = {}

    def network(x_in, t, context=None):
        seen.update(x_in=x_in, t=t, context=context)
        return noise.bfloat16()  # as under autocast

    denoise = Denoiser(VP, "eps").bind(network)
    x = x0 + column(sigma).float() * noise
    x0_hat = denoise(x, sigma, context="text")
    assert x0_hat.dtype == torch.float32 and seen["context"] == "text"
    assert seen["x_in"].dtype == seen["t"].dtype == torch.float32
    torch.testing.assert_close(x0_hat, x - column(sigma).float() * noise.bfloat16().float())
    assert predict(denoise, x, sigma)[1] is None
    assert denoise(x, sigma[0]).shape == x.shape and seen["t"].tolist() == [5, 5, 5]  # one sigma for all


def test_learned_variance_travels_beside_x0():
    x0, noise = pair(torch.float32)
    sigma = VP.sigma(torch.tensor([5, 250, 900]))
    x = x0 + column(sigma).float() * noise
    values = torch.linspace(-1, 1, noise.numel()).reshape(noise.shape)
    denoise = Denoiser(VP, "eps", learned_variance=True).bind(lambda x, t: torch.cat([noise, values], 1))
    plain = Denoiser(VP, "eps").bind(lambda x, t: noise)
    x0_hat, fraction = denoise.predict(x, sigma)
    assert x0_hat.equal(plain(x, sigma)) and denoise(x, sigma).equal(x0_hat)
    torch.testing.assert_close(fraction, (values + 1) / 2)
    half = Denoiser(VP, "eps", learned_variance=True).bind(
        lambda x, t: torch.cat([noise, values], 1).bfloat16()
    )
    assert half.predict(x, sigma)[1].equal((values.bfloat16().float() + 1) / 2)
    clipped, fraction_too = Clipped(denoise).predict(x, sigma)
    assert clipped.equal(x0_hat.clamp(-1, 1)) and fraction_too.equal(fraction)
    assert not clipped.equal(x0_hat)


def test_plain_functions_are_denoise_functions_too():
    def halve(x, sigma):
        return x / 2

    x, _ = pair()
    assert predict(halve, x, torch.ones(3))[0].equal(x / 2)
    assert Clipped(halve, -0.1, 0.2)(x, torch.ones(3)).equal((x / 2).clamp(-0.1, 0.2))


def test_errors_say_what_is_allowed():
    x, _ = pair()
    with pytest.raises(ValueError, match="prediction is 'noise', must be one of eps, v, x0, flow, edm"):
        Denoiser(VP, "noise")
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        Denoiser(DiscreteSchedule(zero_terminal_snr=True), "eps")
    with pytest.raises(ValueError, match="4 channels for 2; learned_variance=False needs 2"):
        Denoiser(VP).bind(lambda x, t: torch.cat([x, x], 1))(x, torch.ones(3))
    with pytest.raises(ValueError, match="2 channels for 2; learned_variance=True needs 4"):
        Denoiser(VP, learned_variance=True).bind(lambda x, t: x)(x, torch.ones(3))
    with pytest.raises(ValueError, match="cannot clamp"):
        Clipped(lambda x, s: x, 1, -1)
