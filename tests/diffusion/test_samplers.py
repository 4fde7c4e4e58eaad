"""Samplers against closed forms, the papers' equations written out, and k-diffusion's trajectories."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference_data import load_cases, relative_error

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, euler, heun, plms
from ldm.diffusion.schedule import DiscreteSchedule, FlowSchedule, karras_sigmas

VP = DiscreteSchedule("linear", 1000, 0.0015, 0.0195)
DETERMINISTIC = {name: SAMPLERS[name] for name in ("ddim", "plms", "euler", "heun", "dpmpp_2m")}
MU, VARIANCE = 0.3, 0.25


def column(sigma, x):
    return sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def gaussian(mu=MU, v=VARIANCE):
    """E[x0 | x] of data N(mu, v)."""

    def denoise(x, sigma):
        s2 = column(sigma, x) ** 2
        return (v * x + s2 * mu) / (v + s2)

    return denoise


def exact(x, sigma, sigma_next, mu=MU, v=VARIANCE):
    """Where the probability flow ODE takes x for data N(mu, v)."""
    return mu + (x - mu) * math.sqrt((v + sigma_next**2) / (v + sigma**2))


def two_points(x, sigma):
    """E[x0 | x] of data at -1 and 1: not linear."""
    return torch.tanh(x / column(sigma, x) ** 2)


def start(dtype=torch.float64, shape=(4, 2, 3)):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(dtype)


def geometric(steps, high=10.0, low=0.1):
    return torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)


def order(sampler, sigmas_of, steps=40, **options):
    """Exponent with which the error falls when the steps double, and the smaller error."""
    errors = []
    for count in (steps, 2 * steps):
        sigmas = sigmas_of(count)
        x = start() * sigmas[0]
        expected = exact(x, sigmas[0].item(), sigmas[-1].item())
        errors.append((sampler(gaussian(), x, sigmas, **options) - expected).abs().max().item())
    return math.log2(errors[0] / errors[1]), errors[1]


@pytest.mark.parametrize("sampler, expected", [(euler, 1), (ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence(sampler, expected):
    measured, error = order(sampler, geometric)
    assert measured == pytest.approx(expected, abs=0.2) and error < 0.1


def flow_ramp(steps):
    t = torch.linspace(10 / 11, 1 / 11, steps + 1, dtype=torch.float64)  # sigma 10 to 0.1
    return t / (1 - t)


@pytest.mark.parametrize("sampler, expected", [(euler, 1), (heun, 2), (dpmpp_2m, 2), (plms, 3)])
def test_order_of_convergence_in_flow_time(sampler, expected):
    """Equal steps in t. PLMS reaches order 4 but is held at 3, and that late, by its first two steps."""
    options = {"flow_time": True} if sampler in (heun, plms) else {}
    measured, error = order(sampler, flow_ramp, 320 if sampler is plms else 40, **options)
    assert measured == pytest.approx(expected, abs=0.3) and error < (1e-8 if sampler is plms else 0.1)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_way_to_zero(name):
    """All the way down with a nonlinear denoiser: x ends at the data point on its side."""
    x = 20 * start()
    sample = DETERMINISTIC[name](two_points, x, karras_sigmas(80, 0.01, 20.0))
    torch.testing.assert_close(sample, x.sign(), rtol=0, atol=1e-6)


# --- k-diffusion ---


def k_denoiser(x, sigma):
    s, v = column(sigma, x), 0.0625
    return (v * x + s**2 * torch.tanh(x / (v + s**2))) / (v + s**2)


@pytest.mark.parametrize(
    "case, sampler, options",
    [
        ("euler", euler, {}),
        ("euler", ddim, {}),
        ("heun", heun, {}),
        ("dpmpp_2m", dpmpp_2m, {}),
        ("euler_ancestral_eta0", ddim, {"eta": 0.0}),
        ("euler_ancestral", ddim, {"eta": 1.0}),
        ("euler_ancestral", ddpm, {"variance": "small"}),
    ],
)
def test_trajectories_of_k_diffusion(case, sampler, options):
    cases = load_cases("k-samplers")
    draws = iter(cases["noise_sequence"])
    sample = sampler(
        k_denoiser, cases["x"], cases["sigmas_karras"], noise_fn=lambda a, b: next(draws), **options
    )
    assert relative_error(sample, cases[f"sample_{case}"]) < 1e-12


# --- the papers' equations, in their own variables ---


def eps_model(x, t):
    """Any smooth function of the sample on the model's scale and its time."""
    return torch.sin(1.3 * x + t.reshape(-1, 1, 1) / 300) + 0.2 * x


def eps_at(x, t):
    return eps_model(x, torch.full((len(x),), t, dtype=x.dtype))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_ddim_is_equation_12(eta, spacing):
    sigmas = VP.sigmas(8, spacing)
    times = VP.time(sigmas).long().tolist()
    x = x_t = start()
    noise = torch.randn(8, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        a, a_next = VP.alphas_cumprod[t], VP.alphas_cumprod[t_next]
        eps = eps_at(x_t, t)
        x0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        std = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()  # eq. 16
        x_t = a_next.sqrt() * x0 + (1 - a_next - std**2).sqrt() * eps + std * noise[i]

    draws = iter(noise)
    denoise = Denoiser(VP).bind(eps_model)
    ours = ddim(denoise, VP.start(x, sigmas[0]), sigmas, eta=eta, noise_fn=lambda a, b: next(draws))
    torch.testing.assert_close(ours * VP.scale(sigmas[-1]), x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 4, 5, 10])
def test_plms_is_the_originals(steps):
    sigmas = VP.sigmas(steps, "uniform")
    times = VP.time(sigmas).long().tolist()
    kept = VP.alphas_cumprod[times].tolist()
    x = x_t = start()

    def move(x_t, eps, i):
        x0 = (x_t - math.sqrt(1 - kept[i]) * eps) / math.sqrt(kept[i])
        return math.sqrt(kept[i + 1]) * x0 + math.sqrt(1 - kept[i + 1]) * eps

    history = []
    for i, t in enumerate(times[:-1]):
        eps = eps_at(x_t, t)
        if i == 0:
            mean = (eps + eps_at(move(x_t, eps, i), times[1])) / 2
        elif i == 1:
            mean = (3 * eps - history[-1]) / 2
        elif i == 2:
            mean = (23 * eps - 16 * history[-1] + 5 * history[-2]) / 12
        else:
            mean = (55 * eps - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history.append(eps)
        x_t = move(x_t, mean, i)

    ours = plms(Denoiser(VP).bind(eps_model), VP.start(x, sigmas[0]), sigmas)
    torch.testing.assert_close(ours * VP.scale(sigmas[-1]), x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ddpm_is_algorithm_2(variance):
    schedule = DiscreteSchedule("sqrt_linear", 20, 0.01, 0.3)
    x = x_t = start()
    noise = torch.randn(20, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(6))
    fraction = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    for i, t in enumerate(reversed(range(20))):
        beta, kept = schedule.betas[t], schedule.alphas_cumprod[t]
        mean = (x_t - beta / (1 - kept).sqrt() * eps_at(x_t, t)) / (1 - beta).sqrt()  # eq. 11
        if t == 0:
            x_t = mean
            break
        small = (1 - schedule.alphas_cumprod[t - 1]) / (1 - kept) * beta
        log_between = fraction * beta.log() + (1 - fraction) * small.log()  # improved DDPM, eq. 15
        std = {"small": small.sqrt(), "large": beta.sqrt(), "learned": (log_between / 2).exp()}[variance]
        x_t = mean + std * noise[i]

    def network(x, t):
        eps = eps_model(x, t)
        return torch.cat([eps, 2 * fraction - 1], 1) if variance == "learned" else eps

    draws = iter(noise)
    denoise = Denoiser(schedule, learned_variance=variance == "learned").bind(network)
    sigmas = schedule.sigmas(20, "leading")
    ours = ddpm(
        denoise, schedule.start(x, sigmas[0]), sigmas, variance=variance, noise_fn=lambda a, b: next(draws)
    )
    torch.testing.assert_close(ours, x_t, rtol=1e-9, atol=1e-9)


# --- exact distributions ---


def variance_of(sampler, denoise, sigmas, initial, **options):
    """Variance of the sample for a linear denoiser: each independent input gets a coordinate of its own."""
    steps = len(sigmas) - 1
    basis = torch.eye(steps + 1, dtype=torch.float64)
    draws = iter(basis[1:])
    x = basis[:1] * math.sqrt(initial)
    coefficients = sampler(denoise, x, sigmas, noise_fn=lambda a, b: next(draws)[None], **options)
    return (coefficients**2).sum().item()


@pytest.mark.parametrize("sampler, options", [(ddpm, {"variance": "small"}), (ddim, {"eta": 1.0})])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_ancestral_steps_keep_the_marginals_of_a_point(sampler, options, steps):
    """If the data is one point, q(x' | x, x0) is p(x' | x), and any number of steps ends at sigma'^2."""
    sigmas = geometric(steps)
    variance = variance_of(sampler, gaussian(0, 0), sigmas, sigmas[0].item() ** 2, **options)
    assert variance == pytest.approx(0.01, rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1))
def test_any_eta_keeps_the_marginals_of_a_point(eta):
    sigmas = geometric(5)
    variance = variance_of(ddim, gaussian(0, 0), sigmas, sigmas[0].item() ** 2, eta=eta)
    assert variance == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_large_variance_is_exact_for_unit_gaussian_data(steps):
    """Why beta_t is the other bound (DDPM, section 3.2)."""
    sigmas = geometric(steps)
    variance = variance_of(ddpm, gaussian(0, 1), sigmas, 1 + sigmas[0].item() ** 2, variance="large")
    assert variance == pytest.approx(1.01, rel=1e-9)


def test_the_variance_between_is_exact_for_other_gaussians():
    """The true variance is the posterior's and what x leaves open about x0: `learned` can say it."""
    sigmas, v = geometric(6), VARIANCE

    class Learned:
        def predict(self, x, sigma):
            s = sigma[0].item()
            s_next = sigmas[(sigmas < s * (1 - 1e-9))][0].item()
            small = s_next**2 * (1 - (s_next / s) ** 2)
            large = (1 + s_next**2) * (s**2 - s_next**2) / (1 + s**2)
            true = small + (1 - (s_next / s) ** 2) ** 2 * v * s**2 / (v + s**2)
            fraction = math.log(true / small) / math.log(large / small)
            assert 0 < fraction < 1
            return gaussian(0, v)(x, sigma), torch.full_like(x, fraction)

    variance = variance_of(ddpm, Learned(), sigmas, v + sigmas[0].item() ** 2, variance="learned")
    assert variance == pytest.approx(v + 0.01, rel=1e-9)


# --- laws ---


def fixed_noise(like):
    generator = torch.Generator().manual_seed(8)
    draws = torch.randn(200, *like.shape, dtype=torch.float64, generator=generator).to(like.dtype)
    iterator = iter(draws)
    return lambda a, b: next(iterator)


decreasing = st.lists(st.floats(0.05, 2.0), min_size=1, max_size=8).map(
    lambda logs: torch.tensor(logs, dtype=torch.float64).flip(0).cumsum(0).flip(0).sub(2).exp()
)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(SAMPLERS)), decreasing, st.booleans(), st.floats(0.1, 10), st.floats(-3, 3))
def test_samplers_follow_scaling_and_shifting_of_the_data(name, sigmas, to_zero, scale, offset):
    """Data k x0 + c is sampled to k times the sample plus c, from k times the sigmas."""
    sampler = SAMPLERS[name]
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]) if to_zero or len(sigmas) < 2 else sigmas
    x = start() * sigmas[0]
    options = {"flow_time": False} if name in ("heun", "plms") else {}

    def moved(x, sigma):
        return scale * k_denoiser((x - offset) / scale, sigma / scale) + offset

    plain = sampler(k_denoiser, x, sigmas, noise_fn=fixed_noise(x), **options)
    followed = sampler(moved, scale * x + offset, scale * sigmas, noise_fn=fixed_noise(x), **options)
    torch.testing.assert_close(followed, scale * plain + offset, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(list(SAMPLERS)), decreasing)
def test_samplers_do_not_see_the_axes(name, sigmas):
    """Rotating start and noise rotates the sample, if the data looks the same from every side."""
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    x = start(shape=(3, 6)) * sigmas[0]
    rotation, _ = torch.linalg.qr(start(shape=(6, 6)))

    def shell(x, sigma):
        return x * torch.tanh(x.norm(dim=1, keepdim=True)) / (1 + column(sigma, x) ** 2)

    noise = fixed_noise(x)
    plain = SAMPLERS[name](shell, x, sigmas, noise_fn=noise)
    noise = fixed_noise(x)
    turned = SAMPLERS[name](shell, x @ rotation, sigmas, noise_fn=lambda a, b: noise(a, b) @ rotation)
    torch.testing.assert_close(turned, plain @ rotation, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_see_each_other(name):
    x, sigmas = 5 * start(), geometric(6, 5.0)
    noise, some = fixed_noise(x), fixed_noise(x)
    whole = SAMPLERS[name](k_denoiser, x, sigmas, noise_fn=noise)
    part = SAMPLERS[name](k_denoiser, x[1:3], sigmas, noise_fn=lambda a, b: some(a, b)[1:3])
    torch.testing.assert_close(part, whole[1:3], rtol=1e-12, atol=1e-12)


# --- numbers ---

STARTS = [(name, {}) for name in SAMPLERS] + [("ddim", {"eta": 1.0}), ("ddpm", {"variance": "large"})]


@pytest.mark.parametrize("name, options", STARTS)
@pytest.mark.parametrize("prediction", ["flow", "v", "x0"])
def test_a_start_as_good_as_infinite_does_not_cancel(name, options, prediction):
    """float32 from sigma 1e6 agrees with float64, and with the exact solution up to the step size."""
    schedule = FlowSchedule(sigma_max=1e6)
    denoiser = Denoiser(schedule, prediction)
    sigmas = schedule.sigmas(20)

    def sample(dtype):
        def network(x_in, t):
            sigma = schedule.sigma(t).to(x_in.dtype).reshape(-1, 1, 1)
            x = x_in * (1 + sigma)
            x0 = (VARIANCE * x_in * (1 + sigma) / sigma**2 + MU) / (VARIANCE / sigma**2 + 1)
            return denoiser.target(x0, (x - x0) / sigma, sigma.flatten())

        x = schedule.start(start(dtype), sigmas[0])
        return SAMPLERS[name](
            denoiser.bind(network), x, sigmas, noise_fn=fixed_noise(start(dtype)), **options
        )

    single, double = sample(torch.float32), sample(torch.float64)
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 2e-5
    if not options and name != "ddpm":
        assert (double - exact(start() * 1e6, 1e6, 0.0)).abs().max() < 0.1


@pytest.mark.parametrize("name", ["heun", "plms"])
def test_flow_time_is_chosen_where_sigma_cannot_carry_a_line(name):
    sampler = SAMPLERS[name]
    x, high, low = start(), FlowSchedule().sigmas(8), geometric(8)
    for sigmas, chosen in ((high, True), (low, False)):
        by_default = sampler(gaussian(), x * sigmas[0], sigmas)
        assert by_default.equal(sampler(gaussian(), x * sigmas[0], sigmas, flow_time=chosen))
        assert not by_default.equal(sampler(gaussian(), x * sigmas[0], sigmas, flow_time=not chosen))


def test_heun_in_flow_time_is_heun_on_the_velocity():
    """z' = z + (t' - t) (v + v') / 2 for z = (1 - t) x0 + t noise, written out."""
    t = [0.95, 0.7, 0.4, 0.1]
    sigmas = [time / (1 - time) for time in t]
    z = start()

    def velocity(z, time):
        sigma = time / (1 - time)
        x0 = two_points(z / (1 - time), torch.full((len(z),), sigma))
        return (z - (1 - time) * x0) / time - x0

    expected = z
    for now, then in zip(t, t[1:], strict=False):
        v = velocity(expected, now)
        expected = expected + (then - now) * (v + velocity(expected + (then - now) * v, then)) / 2
    ours = heun(two_points, z / (1 - t[0]), sigmas, flow_time=True)
    torch.testing.assert_close(ours * (1 - t[-1]), expected)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_carried_in_float32(name, dtype):
    x, sigmas = start(dtype), geometric(10, 1.0)
    seen = set()

    def half_network(x, sigma):
        seen.add(x.dtype)
        return gaussian()(x, sigma).to(dtype)

    sample = SAMPLERS[name](half_network, x, sigmas, noise_fn=fixed_noise(x))
    assert sample.dtype == torch.float32 and seen == {torch.float32}


# --- the contract ---


@pytest.mark.parametrize(
    "name, calls", [("ddpm", 7), ("ddim", 7), ("plms", 8), ("euler", 7), ("heun", 13), ("dpmpp_2m", 7)]
)
def test_calls_and_callback(name, calls):
    sigmas = torch.cat([geometric(6), torch.zeros(1)])
    asked, reported = [], []

    def denoise(x, sigma):
        assert sigma.shape == (len(x),) and sigma.dtype == torch.float64 and not torch.is_grad_enabled()
        asked.append(sigma[0].item())
        return gaussian()(x, sigma)

    x = start().requires_grad_()
    before = x.detach().clone()
    SAMPLERS[name](denoise, x, sigmas, noise_fn=fixed_noise(x), callback=lambda *args: reported.append(args))
    assert len(asked) == calls and x.equal(before)
    assert [i for i, *_ in reported] == list(range(7)) and [s for *_, s in reported] == sigmas[:-1].tolist()
    assert reported[0][1].equal(before)
    for _, x_i, x0_i, sigma in reported:
        torch.testing.assert_close(x0_i, gaussian()(x_i, torch.full((4,), sigma)))


def test_noise_is_asked_for_where_it_is_needed_alone():
    sigmas = torch.cat([geometric(3), torch.zeros(1)])
    pairs = list(zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False))
    asked = []

    def noise_fn(sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return torch.zeros(4, 2, 3)

    for name in DETERMINISTIC:
        SAMPLERS[name](gaussian(), start(), sigmas, noise_fn=noise_fn)
    assert asked == []
    ddpm(gaussian(), start(), sigmas, noise_fn=noise_fn)
    assert asked == pairs[:-1]
    ddim(gaussian(), start(), sigmas, noise_fn=noise_fn, eta=0.3)
    assert asked == 2 * pairs[:-1]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [1.0, 2.0], [1.0, 1.0], [1.0, -1.0], [math.inf, 1.0], [math.nan, 1.0]]
)
def test_bad_sigmas_are_refused(name, sigmas):
    with pytest.raises(ValueError, match="strictly decreasing"):
        SAMPLERS[name](gaussian(), start(), sigmas, noise_fn=fixed_noise(start()))


def test_errors_say_what_is_missing():
    x, sigmas = start(), geometric(3)
    with pytest.raises(ValueError, match="needs noise_fn"):
        ddpm(gaussian(), x, sigmas)
    with pytest.raises(ValueError, match="needs noise_fn"):
        ddim(gaussian(), x, sigmas, eta=0.5)
    with pytest.raises(ValueError, match="eta must be in .0, 1., got 2"):
        ddim(gaussian(), x, sigmas, eta=2)
    with pytest.raises(ValueError, match="variance is 'tiny'"):
        ddpm(gaussian(), x, sigmas, variance="tiny")
    with pytest.raises(ValueError, match="gives none"):
        ddpm(gaussian(), x, sigmas, variance="learned", noise_fn=fixed_noise(x))
