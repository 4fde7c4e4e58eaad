"""Losses, weights and time distributions against their formulas; the bound against exact cases."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.likelihood import (
    discretized_gaussian_nll,
    gaussian_kl,
    gaussian_step,
    reverse_variances,
    step_sigmas,
    variational_bound,
)
from ldm.diffusion.objective import Objective, TimeLogitNormal, TimeUniform
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule

VP = DiscreteSchedule("linear", 1000, 0.0015, 0.0195)
T = torch.tensor([4, 300, 900])
SIGMA = VP.sigma(T)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(3, 2, 4, 4, dtype=dtype, generator=generator) for _ in range(3))


def column(values):
    return values.reshape(-1, 1, 1, 1)


def test_losses_are_means_over_a_sample():
    x0, noise, raw = batch()
    difference = (raw - noise).abs()
    huber = torch.where(difference < 0.7, difference**2 / 2, 0.7 * (difference - 0.35))
    expected = {"l2": difference**2, "l1": difference, "huber": huber}
    for loss, values in expected.items():
        result = Objective(Denoiser(VP), loss=loss, huber_delta=0.7).at(lambda x, t: raw, x0, noise, SIGMA)
        torch.testing.assert_close(result["loss"], values.mean((1, 2, 3)))
        torch.testing.assert_close(result["simple"], result["loss"])
        assert result["t"].equal(T.double()) and result["sigma"].equal(SIGMA)
        torch.testing.assert_close(result["x0_hat"], x0 + column(SIGMA) * (noise - raw))


def test_min_snr_weights_are_the_published_ones():
    x0, noise, raw = batch()
    snr = VP.alphas_cumprod[T] / (1 - VP.alphas_cumprod[T])
    clipped = snr.clamp(max=5)
    for prediction, weight in {"eps": clipped / snr, "v": clipped / (snr + 1), "x0": clipped}.items():
        plain = Objective(Denoiser(VP, prediction)).at(lambda x, t: raw, x0, noise, SIGMA)
        weighted = Objective(Denoiser(VP, prediction), weighting="min_snr").at(
            lambda x, t: raw, x0, noise, SIGMA
        )
        torch.testing.assert_close(weighted["loss"], weight * plain["loss"])
        assert weighted["simple"].equal(plain["simple"])


def test_min_snr_weighs_the_error_of_x0_whatever_is_predicted():
    x0, noise, x0_hat = batch()
    losses = []
    for prediction in ("eps", "v", "x0", "flow", "edm"):
        denoiser = Denoiser(VP, prediction)
        x = x0 + column(SIGMA) * noise
        raw = denoiser.target(x0_hat, (x - x0_hat) / column(SIGMA), SIGMA)  # every network that says this x0
        losses.append(
            Objective(denoiser, weighting="min_snr").at(lambda x, t, raw=raw: raw, x0, noise, SIGMA)["loss"]
        )
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_plain_edm_loss_has_edms_weight():
    x0, noise, raw = batch()
    denoiser = Denoiser(EDMSchedule(), "edm", sigma_data=0.5)
    result = Objective(denoiser).at(lambda x, t: raw, x0, noise, SIGMA)
    error = ((result["x0_hat"] - x0) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(result["loss"], (SIGMA**2 + 0.25) / (0.5 * SIGMA) ** 2 * error)


def test_the_best_noise_prediction_of_a_gaussian_has_its_known_loss():
    """For x0 ~ N(0, v), E |noise - E[noise | x]|^2 = v / (v + sigma^2)."""
    generator = torch.Generator().manual_seed(3)
    v = 0.36
    x0 = 0.6 * torch.randn(3, 1, 200, 200, generator=generator)
    noise = torch.randn(3, 1, 200, 200, generator=generator)

    def network(x_in, t):
        sigma = column(VP.sigma(t)).float()
        x = x_in * (1 + sigma**2).sqrt()
        return sigma * x / (v + sigma**2)

    loss = Objective(Denoiser(VP)).at(network, x0, noise, SIGMA)["loss"].double()
    torch.testing.assert_close(loss, v / (v + SIGMA**2), rtol=0.02, atol=0)


def test_u_is_all_that_decides_the_time():
    x0, noise, raw = batch(torch.float32)
    for schedule, time, expected in (
        (VP, TimeUniform(), lambda t: (1000 * t).floor()),
        (FlowSchedule(), TimeLogitNormal(0.5, 2.0, shift=3.0), lambda t: 1000 * t),
    ):
        objective = Objective(Denoiser(schedule, "v"), time)
        u = torch.tensor([0.2, 0.5004, 0.999])
        first, second = (objective(lambda x, t, k: raw * k, x0, noise, u, {"k": 2.0}) for _ in range(2))
        assert all(first[key].equal(second[key]) for key in first)
        torch.testing.assert_close(first["t"], expected(time(u)).float())
        # A sample's loss does not know the other samples.
        alone = objective(lambda x, t, k: raw[1:2] * k, x0[1:2], noise[1:2], u[1:2], {"k": 2.0})
        torch.testing.assert_close(alone["loss"], first["loss"][1:2])


def test_half_precision_data_is_mixed_in_float32():
    x0, noise, raw = batch(torch.bfloat16)
    seen = []

    def network(x, t):
        seen.append((x.dtype, t.dtype))
        return raw

    result = Objective(Denoiser(VP))(network, x0, noise, torch.tensor([0.1, 0.5, 0.9]))
    assert seen == [(torch.float32, torch.float32)] and result["loss"].dtype == torch.float32


def test_the_gradient_is_the_networks_alone():
    x0, noise, raw = batch()
    raw = raw.requires_grad_()
    result = Objective(Denoiser(VP), weighting="min_snr").at(lambda x, t: raw, x0, noise, SIGMA)
    assert not result["x0_hat"].requires_grad and not result["simple"].requires_grad
    result["loss"].sum().backward()
    snr = SIGMA**-2
    expected = column(snr.clamp(max=5) / snr) * 2 * (raw.detach() - noise) / raw[0].numel()
    torch.testing.assert_close(raw.grad, expected)


def test_time_distributions():
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    assert TimeUniform()(u).equal(u)
    z = torch.logit(TimeLogitNormal(-0.4, 1.2)(u))  # ln sigma of a flow: EDM's log-normal
    assert z.mean().item() == pytest.approx(-0.4, abs=1e-3) and z.std().item() == pytest.approx(1.2, abs=1e-3)
    assert TimeLogitNormal()(torch.tensor([0.5])).item() == 0.5
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    for time in (TimeUniform(7.0), TimeLogitNormal(0.0, 1.0, 7.0), TimeLogitNormal(3.0, 3.0)):
        t = time(ends)
        assert t.dtype == torch.float64 and 0 < t[0] < t[1] < 1


@settings(deadline=None)
@given(st.floats(-2, 2), st.floats(0.2, 2), st.floats(0.2, 10))
def test_shift_moves_a_logit_normal_by_its_logarithm(mean, std, shift):
    u = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    torch.testing.assert_close(
        TimeLogitNormal(mean, std, shift)(u), TimeLogitNormal(mean + math.log(shift), std)(u)
    )


def test_posterior_is_equation_7_of_ddpm():
    x_start, noise, _ = batch()
    for t in (1, 2, 500, 999):
        beta, kept, before = VP.betas[t], VP.alphas_cumprod[t], VP.alphas_cumprod[t - 1]
        x_t = kept.sqrt() * x_start + (1 - kept).sqrt() * noise
        mean = before.sqrt() * beta * x_start + (1 - beta).sqrt() * (1 - before) * x_t
        mean = mean / (1 - kept)
        ours, log_variance = gaussian_step(VP, x_t / kept.sqrt(), x_start, torch.full((3,), t))
        torch.testing.assert_close(ours * before.sqrt(), mean)
        variance = (1 - before) / (1 - kept) * beta
        torch.testing.assert_close(
            log_variance.exp() * before, variance.expand_as(x_start), rtol=1e-9, atol=0
        )
        large = gaussian_step(VP, x_t, x_start, torch.full((3,), t), "large")[1]
        torch.testing.assert_close(large.exp() * before, beta.expand_as(x_start), rtol=1e-9, atol=0)


def test_last_step_borrows_the_variance_of_the_one_before():
    x_start, x, _ = batch()
    t = torch.tensor([0, 0, 1])
    small, large = gaussian_step(VP, x, x_start, t)[1], gaussian_step(VP, x, x_start, t, "large")[1]
    expected = VP.betas[1] * (1 - VP.alphas_cumprod[0]) / (1 - VP.alphas_cumprod[1])
    torch.testing.assert_close(small[0].exp(), expected.expand_as(small[0]))
    assert small[0].equal(large[0])
    learned = gaussian_step(VP, x, x_start, t, "learned", torch.ones_like(x))[1]
    torch.testing.assert_close(learned[0].exp(), VP.betas[0].expand_as(learned[0]))
    torch.testing.assert_close(learned[2], large[2])


def test_bound_of_the_truth_is_zero():
    x_start, noise, _ = batch()
    x = x_start + column(SIGMA) * noise
    assert variational_bound(VP, x_start, x, T, x_start).abs().max() < 1e-12
    assert variational_bound(VP, x_start, x, T, x_start, "large").min() > 0
    assert variational_bound(VP, x_start, x, T, x_start + 0.1).min() > 0


def test_bound_of_the_last_step_is_the_likelihood_of_the_image():
    x_start, noise, _ = batch()
    x_start = (x_start / 3).clamp(-1, 1)
    t = torch.tensor([0, 0, 7])
    x = x_start + column(VP.sigma(t)) * noise
    bits = variational_bound(VP, x_start, x, t, x_start + 0.01)
    # The last step's mean is x0 itself.
    log_variance = gaussian_step(VP, x, x_start, t)[1]
    nats = discretized_gaussian_nll(x_start, x_start + 0.01, log_variance).mean((1, 2, 3))
    torch.testing.assert_close(bits[:2], nats[:2] / math.log(2))
    assert bits[2] < bits[0]


def test_bound_is_half_the_loss_in_signal_to_noise():
    """KL = (SNR(t-1) - SNR(t)) |x0 - x0_hat|^2 / 2 at equal variances (Kingma et al. 2021, VDM)."""
    x_start, noise, difference = batch()
    x = x_start + column(SIGMA) * noise
    sigma, sigma_next = step_sigmas(VP, T)
    nats = 0.5 * (sigma_next**-2 - sigma**-2) * (difference**2).mean((1, 2, 3))
    bits = variational_bound(VP, x_start, x, T, x_start + difference)
    torch.testing.assert_close(bits, nats / math.log(2))


def test_kl_is_that_of_torch():
    m1, v1, m2 = batch()
    v2 = m1 * m2
    p, q = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((m1, v1), (m2, v2)))
    torch.testing.assert_close(gaussian_kl(m1, v1, m2, v2), torch.distributions.kl_divergence(p, q))


@pytest.mark.parametrize("mean, std", [(0.1, 0.3), (-0.99, 0.01), (1.5, 2.0), (0.0, 0.004)])
def test_the_256_levels_share_all_the_mass(mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nll = discretized_gaussian_nll(levels, torch.tensor(mean), torch.tensor(2 * math.log(std)))
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert levels[nll.argmin()].item() == pytest.approx(min(max(mean, -1), 1), abs=1 / 127) or std > 1


def test_learned_variance_learns_from_the_bound_alone():
    x_start, noise, raw = batch()
    values = torch.zeros_like(raw).requires_grad_()
    raw = raw.requires_grad_()
    objective = Objective(Denoiser(VP, learned_variance=True))
    result = objective.at(lambda x, t: torch.cat([raw, values], 1), x_start, noise, SIGMA)
    torch.testing.assert_close(result["loss"], result["simple"] + result["vb"])
    result["loss"].sum().backward()
    # The prediction's gradient holds nothing from the bound.
    torch.testing.assert_close(raw.grad, 2 * (raw.detach() - noise) / raw[0].numel())
    assert (values.grad != 0).all()

    def bound(value):
        fraction = torch.full_like(noise, (value + 1) / 2)
        x = x_start + column(SIGMA) * noise
        return variational_bound(VP, x_start, x, T, result["x0_hat"], "learned", fraction)

    numeric = (bound(1e-5) - bound(-1e-5)) / 2e-5
    torch.testing.assert_close(values.grad.sum((1, 2, 3)), numeric, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(result["vb"], bound(0.0))


def test_learned_bound_counts_steps_in_thousands():
    """T / 1000 of improved DDPM keeps the bound's weight when there are fewer, larger steps."""
    x_start, noise, raw = batch()
    short = DiscreteSchedule("linear", 100, 0.015, 0.19)
    t = torch.tensor([4, 30, 90])
    result = Objective(Denoiser(short, learned_variance=True)).at(
        lambda x, t: torch.cat([raw, raw], 1), x_start, noise, short.sigma(t)
    )
    x = x_start + column(short.sigma(t)) * noise
    bits = variational_bound(short, x_start, x, t, result["x0_hat"], "learned", (raw + 1) / 2)
    torch.testing.assert_close(result["vb"], bits / 10)


def test_large_and_small_variance_are_ordered():
    sigma, sigma_next = VP.sigmas_all[1:], VP.sigmas_all[:-1]
    small, large = reverse_variances(sigma, sigma_next)
    assert (small > 0).all() and (small < large).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Objective(Denoiser(VP), loss="mse"), "loss is 'mse', must be one of l2, l1, huber"),
        (
            lambda: Objective(Denoiser(VP), weighting="snr"),
            "weighting is 'snr', must be one of none, min_snr",
        ),
        (lambda: Objective(Denoiser(FlowSchedule(), "flow", learned_variance=True)), "DiscreteSchedule"),
        (lambda: TimeUniform(0), "shift is 0"),
        (lambda: TimeLogitNormal(std=0), "std is 0"),
    ],
)
def test_errors_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    x, _, _ = batch()
    with pytest.raises(ValueError, match="variance is 'tiny'"):
        gaussian_step(VP, x, x, T, "tiny")
    with pytest.raises(ValueError, match="no fraction"):
        gaussian_step(VP, x, x, T, "learned")
