"""Guidance with and without a classifier: equations, batches, shortcuts."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ldm.diffusion.denoiser import Clipped, Denoiser, predict
from ldm.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from ldm.diffusion.samplers import ddpm, euler
from ldm.diffusion.schedule import DiscreteSchedule, FlowSchedule

X = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COND = {"shift": torch.tensor([1.0, 2.0, 3.0]).double(), "gain": torch.tensor([0.1, 0.2, 0.3]).double()}
NONE = {"shift": torch.zeros(3).double(), "gain": torch.ones(3).double()}
SIGMA = torch.tensor([0.5, 2.0, 10.0], dtype=torch.float64)


class Spy:
    """An affine denoiser that depends on every argument, and counts the samples it is asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, shift, gain, bias=None):
        self.batches.append(len(x))
        assert len(sigma) == len(x) == len(shift) == len(gain)
        column = (len(x), 1, 1, 1)
        x0 = gain.reshape(column) * x + shift.reshape(column) / (1 + sigma.reshape(column))
        return x0 if bias is None else x0 + bias


@settings(deadline=None)
@given(st.floats(-3, 20))
def test_guidance_is_its_equation_in_one_batch(scale):
    spy = Spy()
    guided = ClassifierFreeGuidance(spy, COND, NONE, scale)(X, SIGMA)
    expected = (1 - scale) * Spy()(X, SIGMA, **NONE) + scale * Spy()(X, SIGMA, **COND)
    torch.testing.assert_close(guided, expected)
    assert spy.batches == [3 if scale in (0, 1) else 6]


@pytest.mark.parametrize("scale, condition", [(1.0, COND), (0.0, NONE)])
def test_the_ends_cost_one_model(scale, condition):
    spy = Spy()
    assert ClassifierFreeGuidance(spy, COND, NONE, scale)(X, SIGMA).equal(Spy()(X, SIGMA, **condition))
    assert spy.batches == [3]


@settings(deadline=None)
@given(st.floats(-3, 20))
def test_identical_conditions_leave_nothing_to_guide(scale):
    guided = ClassifierFreeGuidance(Spy(), COND, COND, scale)(X, SIGMA)
    torch.testing.assert_close(guided, Spy()(X, SIGMA, **COND), rtol=1e-12, atol=1e-12)


def test_guiding_x0_is_guiding_the_raw_prediction():
    """The weights sum to one, so what the network predicts does not matter."""
    schedule = DiscreteSchedule()
    sigma = schedule.sigma(torch.tensor([10, 400, 900]))
    for prediction in ("eps", "v", "x0", "flow", "edm"):
        denoiser = Denoiser(schedule, prediction)

        def network(x, t, y):
            return torch.tanh(x + y.reshape(-1, 1, 1, 1))

        def guided_network(x, t, network=network):
            with_y, without = network(x, t, COND["shift"]), network(x, t, NONE["shift"])
            return without + 4 * (with_y - without)

        guided = ClassifierFreeGuidance(
            denoiser.bind(network), {"y": COND["shift"]}, {"y": NONE["shift"]}, 4.0
        )
        torch.testing.assert_close(guided(X, sigma), denoiser.bind(guided_network)(X, sigma))


def test_interval():
    conditional = Spy()(X, SIGMA, **COND)
    everywhere = ClassifierFreeGuidance(Spy(), COND, NONE, 3.0)(X, SIGMA)
    spy = Spy()
    guided = ClassifierFreeGuidance(spy, COND, NONE, 3.0, interval=(0.5, 2.0))
    mixed = guided(X, SIGMA)  # 0.5 is outside, 2 inside, 10 outside
    assert mixed[0].equal(conditional[0]) and mixed[1].equal(everywhere[1]) and mixed[2].equal(conditional[2])
    assert (
        guided(X, torch.tensor(10.0)).shape == X.shape
        and guided(X, SIGMA.new_full((3,), 1.0)).shape == X.shape
    )
    assert spy.batches == [6, 3, 6]
    # Scale 0 outside the interval is still the conditional model.
    none = ClassifierFreeGuidance(Spy(), COND, NONE, 0.0, interval=(0.5, 2.0))(X, SIGMA)
    torch.testing.assert_close(none[0], conditional[0])
    torch.testing.assert_close(none[1], Spy()(X, SIGMA, **NONE)[1])


def test_shared_conditions_reach_both_halves():
    bias = torch.arange(3.0, dtype=torch.float64).reshape(3, 1, 1, 1)
    plain = ClassifierFreeGuidance(Spy(), COND, NONE, 3.0)(X, SIGMA)
    shared = ClassifierFreeGuidance(Spy(), COND, NONE, 3.0)(X, SIGMA, bias=bias)
    torch.testing.assert_close(shared, plain + bias)


def test_learned_variance_is_the_conditional_models():
    schedule = DiscreteSchedule()

    def network(x, t, y):
        return torch.cat([x, torch.ones_like(x) * y.reshape(-1, 1, 1, 1)], 1)

    denoise = Denoiser(schedule, learned_variance=True).bind(network)
    guided = ClassifierFreeGuidance(denoise, {"y": COND["gain"]}, {"y": NONE["gain"]}, 2.0)
    _, fraction = guided.predict(X, SIGMA)
    torch.testing.assert_close(fraction, ((1 + COND["gain"]) / 2).reshape(-1, 1, 1, 1).expand_as(X))
    assert predict(Clipped(guided), X, SIGMA)[1].equal(fraction)
    sample = ddpm(guided, X, schedule.sigmas(4), variance="learned", noise_fn=lambda a, b: torch.ones_like(X))
    assert sample.isfinite().all()


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"cond has the keys \['gain', 'shift'\], uncond \['shift'\]"):
        ClassifierFreeGuidance(Spy(), COND, {"shift": NONE["shift"]}, 2.0)
    with pytest.raises(ValueError, match=r"'y' has shape \(2, 7\) with, \(1, 7\) without"):
        ClassifierFreeGuidance(Spy(), {"y": torch.zeros(2, 7)}, {"y": torch.zeros(1, 7)}, 2.0)
    with pytest.raises(ValueError, match="finite"):
        ClassifierFreeGuidance(Spy(), COND, NONE, float("nan"))
    with pytest.raises(ValueError, match="interval"):
        ClassifierFreeGuidance(Spy(), COND, NONE, 2.0, interval=(2.0, 1.0))


# With a classifier


MEANS = torch.tensor([[-1.0, 0.5], [2.0, -1.5]]).double()[:, :, None, None]  # two classes of (2, 1, 1) images
PRIOR = torch.tensor([0.3, 0.7]).double()
SPREAD = 0.4  # standard deviation within a class
LABELS = torch.tensor([0, 1, 1])
POINTS = torch.randn(3, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def column(value):
    return torch.as_tensor(value).double().reshape(-1, 1, 1, 1)


def logits_at(x, sigma):
    """log p(class) p(x | class) of x = x0 + sigma noise, up to a constant; (B, 2)."""
    distance = (x[:, None] - MEANS).square().sum((2, 3, 4))
    return PRIOR.log() - distance / (2 * (SPREAD**2 + torch.as_tensor(sigma).reshape(-1, 1) ** 2))


def mean_of_class(x, sigma, mean):
    """E[x0 | x, class]."""
    sigma = column(sigma)
    return (SPREAD**2 * x + sigma**2 * mean) / (SPREAD**2 + sigma**2)


def mixture(x, sigma, **cond):
    """E[x0 | x] of both classes together."""
    weights = logits_at(x, sigma).softmax(1)
    return sum(column(weights[:, i]) * mean_of_class(x, sigma, MEANS[i]) for i in range(2))


class NoisyClassifier(torch.nn.Module):
    """The mixture's own, which is handed what a network is handed; it has a parameter, and counts calls."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.calls = schedule, 0
        self.gain = torch.nn.Parameter(torch.ones(()).double())

    def forward(self, x_in, t):
        self.calls += 1
        sigma = self.schedule.sigma(t)
        return self.gain * logits_at(x_in / column(self.schedule.scale(sigma)), sigma)


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), FlowSchedule()])
def test_bayes_rule_turns_the_mixture_into_one_class(schedule):
    sigma = schedule.sigma(torch.tensor([100, 400, 900]))
    guided = ClassifierGuidance(mixture, NoisyClassifier(schedule), LABELS, denoiser=Denoiser(schedule, "v"))
    expected = mean_of_class(POINTS, sigma, MEANS[LABELS])
    torch.testing.assert_close(guided(POINTS, sigma), expected, rtol=1e-6, atol=1e-6)


def test_the_scale_multiplies_the_shift():
    schedule = DiscreteSchedule()
    sigma, classifier = schedule.sigma(torch.tensor([100, 400, 900])), NoisyClassifier(schedule)

    def shift(scale):
        guided = ClassifierGuidance(mixture, classifier, LABELS, scale, Denoiser(schedule))
        return guided(POINTS, sigma) - mixture(POINTS, sigma)

    torch.testing.assert_close(shift(-2.5), -2.5 * shift(1.0))
    classifier.calls = 0
    assert not shift(0.0).any() and classifier.calls == 0


def test_is_the_papers_algorithm():
    """Dhariwal & Nichol 2021, algorithm 2, in its own terms: x_t = sqrt(a) x0 + sqrt(1 - a) eps."""
    schedule = DiscreteSchedule()
    t = torch.tensor([10, 400, 900])
    a = column(schedule.alphas_cumprod[t])
    x_t = POINTS.clone().requires_grad_()
    classifier = NoisyClassifier(schedule)
    log_p = classifier(x_t, t).log_softmax(1)[torch.arange(3), LABELS]
    (gradient,) = torch.autograd.grad(log_p.sum(), x_t)
    eps = torch.tanh(POINTS)  # of some network
    eps = eps - (1 - a).sqrt() * 3.0 * gradient
    expected = (POINTS - (1 - a).sqrt() * eps) / a.sqrt()

    denoise = Denoiser(schedule, "eps").bind(lambda x, t: torch.tanh(x))
    guided = ClassifierGuidance(denoise, classifier, LABELS, 3.0, Denoiser(schedule))
    x0 = guided(POINTS / a.sqrt(), schedule.sigma(t))
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)


def test_a_classifier_of_clean_images_judges_the_denoised_one():
    """With x0 = a x + b and logits w x0, the gradient is a (w_y - sum_k p_k w_k)."""
    weights = torch.tensor([[1.0, -2.0], [0.5, 0.25], [-1.0, 1.0]]).double()
    seen = []

    def classifier(x0):
        seen.append(x0.detach())
        return x0.flatten(1) @ weights.T

    def denoise(x, sigma):
        return mean_of_class(x, sigma, MEANS[0])

    x0 = denoise(POINTS, SIGMA)
    gain = SPREAD**2 / (SPREAD**2 + SIGMA**2)
    p = (x0.flatten(1) @ weights.T).softmax(1)
    gradient = gain[:, None] * (weights[LABELS] - p @ weights)
    expected = x0 + 1.5 * column(SIGMA**2) * gradient[:, :, None, None]
    torch.testing.assert_close(ClassifierGuidance(denoise, classifier, LABELS, 1.5)(POINTS, SIGMA), expected)
    assert len(seen) == 1 and seen[0].equal(x0)


@pytest.mark.parametrize("noisy", [True, False])
def test_samples_are_of_the_class_asked_for(noisy):
    schedule = FlowSchedule()
    noise = torch.randn(40, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(40) % 2
    classifier, denoiser = (
        (NoisyClassifier(schedule), Denoiser(schedule)) if noisy else (lambda x0: logits_at(x0, 0.0), None)
    )
    guided = ClassifierGuidance(mixture, classifier, labels, 1.0, denoiser, interval=(0.0, 50.0))
    sigmas = schedule.sigmas(60)
    x = euler(guided, schedule.start(noise, sigmas[0]), sigmas)
    assert logits_at(x, 0.0).argmax(1).equal(labels)
    free = euler(mixture, schedule.start(noise, sigmas[0]), sigmas)
    assert not logits_at(free, 0.0).argmax(1).equal(labels)


def test_samples_of_a_batch_do_not_mix():
    schedule = DiscreteSchedule()
    sigma, classifier = schedule.sigma(torch.tensor([100, 400, 900])), NoisyClassifier(schedule)
    for denoiser, judge in ((Denoiser(schedule), classifier), (None, lambda x0: logits_at(x0, 0.0))):
        whole = ClassifierGuidance(mixture, judge, LABELS, 2.0, denoiser)(POINTS, sigma)
        for i in range(3):
            one = ClassifierGuidance(mixture, judge, LABELS[i : i + 1], 2.0, denoiser)
            torch.testing.assert_close(one(POINTS[i : i + 1], sigma[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("noisy", [True, False])
def test_no_graph_and_no_gradient_are_left(noisy):
    schedule = DiscreteSchedule()
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 4, 1).double()
    denoise = Denoiser(schedule, learned_variance=True).bind(lambda x, t: network(x).tanh())
    classifier = NoisyClassifier(schedule)
    judge, denoiser = (classifier, Denoiser(schedule)) if noisy else (
        lambda x0: classifier.gain * logits_at(x0, 0.0), None
    )  # fmt: skip
    guided = ClassifierGuidance(denoise, judge, LABELS, 2.0, denoiser)
    x = POINTS.clone()
    with torch.no_grad():
        x0, fraction = guided.predict(x, SIGMA)
    assert not any(t.requires_grad for t in (x, x0, fraction))
    assert classifier.gain.grad is None and all(p.grad is None for p in network.parameters())
    torch.testing.assert_close(fraction, denoise.predict(x, SIGMA)[1])
    guided = ClassifierGuidance(denoise, judge, LABELS, 2.0, denoiser, interval=(0.0, 5.0))
    sample = ddpm(guided, x, schedule.sigmas(4), variance="learned", noise_fn=lambda a, b: torch.ones_like(x))
    assert sample.isfinite().all()


def test_levels_outside_the_interval_are_left_alone():
    schedule = DiscreteSchedule()
    classifier, denoiser = NoisyClassifier(schedule), Denoiser(schedule)
    everywhere = ClassifierGuidance(mixture, classifier, LABELS, 2.0, denoiser)(POINTS, SIGMA)
    guided = ClassifierGuidance(mixture, classifier, LABELS, 2.0, denoiser, interval=(0.5, 2.0))
    mixed, plain = guided(POINTS, SIGMA), mixture(POINTS, SIGMA)
    assert mixed[0].equal(plain[0]) and mixed[1].equal(everywhere[1]) and mixed[2].equal(plain[2])
    classifier.calls = 0
    assert guided(POINTS, SIGMA.new_full((3,), 30.0)).isfinite().all() and classifier.calls == 0


def test_both_guidances_together():
    schedule = DiscreteSchedule()
    free = ClassifierFreeGuidance(Spy(), COND, NONE, 3.0)
    guided = ClassifierGuidance(free, lambda x0: x0.mean((2, 3)), LABELS, 1.0, interval=(0.6, 5.0))
    torch.testing.assert_close(guided(X, SIGMA)[::2], free(X, SIGMA)[::2])
    assert not torch.allclose(guided(X, SIGMA)[1], free(X, SIGMA)[1])
    assert euler(guided, X, schedule.sigmas(5)).isfinite().all()


def test_errors_of_classifier_guidance():
    def guide(*arguments, **options):
        return ClassifierGuidance(mixture, lambda x0: logits_at(x0, 0.0), *arguments, **options)

    with pytest.raises(ValueError, match=r"labels are torch.float32 of shape \(3,\)"):
        guide(torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        guide(LABELS, float("inf"))
    with pytest.raises(ValueError, match="interval"):
        guide(LABELS, interval=(2.0, 2.0))
    with pytest.raises(ValueError, match="2 labels for 3 samples"):
        guide(LABELS[:2])(POINTS, SIGMA)
    with pytest.raises(ValueError, match=r"gives \(3, 2, 1, 1\) for 3 samples"):
        ClassifierGuidance(mixture, lambda x0: x0, LABELS)(POINTS, SIGMA)
