"""Classifier-free guidance: its equation, its batch, its shortcuts."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ldm.diffusion.denoiser import Clipped, Denoiser, predict
from ldm.diffusion.guidance import ClassifierFreeGuidance
from ldm.diffusion.samplers import ddpm
from ldm.diffusion.schedule import DiscreteSchedule

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
