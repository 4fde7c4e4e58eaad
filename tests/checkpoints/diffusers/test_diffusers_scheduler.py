"""Noise schedules and prediction types as diffusers' scheduler configs."""

import pytest
import torch
from diffusers_data import require_diffusers
from reference_data import relative_error

from ldm import config as configuration
from ldm.checkpoints.description import NotExpressible
from ldm.checkpoints.diffusers.scheduler import (
    denoiser_part,
    sampling_defaults,
    scheduler_config,
)
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule
from ldm.weights.errors import UnsupportedCheckpoint

ENDS = {"linear_start": 1e-4, "linear_end": 2e-2}
SCHEDULES = {
    "linear": {"linear_start": 0.00085, "linear_end": 0.012},
    "sqrt_linear": {"linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 400},
    "cosine": {},
    "sqrt": {"linear_start": 1e-4, "linear_end": 4e-4},
}
OWN = [0.001 * (1 + i % 7) for i in range(50)]
ALL = {name: {"schedule": name, **options} for name, options in SCHEDULES.items()} | {
    "own betas": {"betas": OWN},
    "other cosine": {"schedule": "cosine", "cosine_s": 0.02},
    "zero terminal": {**SCHEDULES["linear"], "zero_terminal_snr": True},
    "zero terminal, plain": {**ENDS, "schedule": "sqrt_linear", "zero_terminal_snr": True},
}


def built(part: dict) -> Denoiser:
    return configuration.instantiate(configuration.loads(configuration.to_yaml({"d": part}), origin="test").d)


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_survives_the_config(name):
    denoiser = Denoiser(DiscreteSchedule(**ALL[name]), "v")
    again = built(denoiser_part(scheduler_config(denoiser), "here", learned_variance=False))
    assert again.prediction == "v"
    assert again.schedule.zero_terminal_snr == denoiser.schedule.zero_terminal_snr
    ratio = again.schedule.alphas_cumprod / denoiser.schedule.alphas_cumprod
    assert (ratio - 1).abs().max() < 1e-8


@pytest.mark.parametrize("name", ALL)
def test_diffusers_makes_the_same_tables_of_it(name):
    diffusers = require_diffusers()
    denoiser = Denoiser(DiscreteSchedule(**ALL[name]), "v")
    config = scheduler_config(denoiser)
    scheduler = getattr(diffusers, config.pop("_class_name"))(**config)
    assert relative_error(scheduler.alphas_cumprod, denoiser.schedule.alphas_cumprod) < 1e-5


def test_names_are_the_other_projects_names():
    found = {name: scheduler_config(Denoiser(DiscreteSchedule(**ALL[name]))) for name in SCHEDULES}
    assert {name: config.get("beta_schedule") for name, config in found.items()} == {
        "linear": "scaled_linear",
        "sqrt_linear": "linear",
        "cosine": "squaredcos_cap_v2",
        "sqrt": None,
    }
    assert (found["linear"]["beta_start"], found["linear"]["beta_end"]) == (0.00085, 0.012)
    assert found["sqrt_linear"]["num_train_timesteps"] == 400
    assert len(found["sqrt"]["trained_betas"]) == 1000


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (None, ("DDIMScheduler", "trailing", 0, True)),
        ({"sampler": "ddim", "spacing": "uniform"}, ("DDIMScheduler", "leading", 1, False)),
        ({"sampler": "euler", "spacing": "leading"}, ("DDIMScheduler", "leading", 0, True)),
        ({"sampler": "plms", "spacing": "uniform"}, ("PNDMScheduler", "leading", 1, False)),
        ({"sampler": "ddpm", "spacing": "trailing"}, ("DDPMScheduler", "trailing", 0, None)),
    ],
)
def test_defaults_for_sampling_choose_the_scheduler_and_come_back(sampling, expected):
    config = scheduler_config(Denoiser(DiscreteSchedule()), sampling)
    keys = ("_class_name", "timestep_spacing", "steps_offset", "set_alpha_to_one")
    assert tuple(config.get(key) for key in keys) == expected
    assert config.get("clip_sample", False) is False
    again, lost = sampling_defaults(config)
    assert lost == []
    assert again["spacing"] == (sampling or {}).get("spacing", "trailing")
    assert again["sampler"] == {"euler": "ddim"}.get((sampling or {}).get("sampler"), again["sampler"])


def test_a_learned_variance_needs_ddpm():
    config = scheduler_config(Denoiser(DiscreteSchedule(), learned_variance=True), {"sampler": "ddim"})
    assert (config["_class_name"], config["variance_type"]) == ("DDPMScheduler", "learned_range")
    assert built(denoiser_part(config, "here", learned_variance=True)).learned_variance


def test_flows_and_edm():
    config = scheduler_config(Denoiser(FlowSchedule(), "flow"))
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    again = built(denoiser_part(config, "here", learned_variance=False))
    assert (type(again.schedule), again.prediction) == (FlowSchedule, "flow")
    config = scheduler_config(Denoiser(EDMSchedule(0.01, 50.0), "edm", sigma_data=0.7))
    again = built(denoiser_part(config, "here", learned_variance=False))
    found = (again.schedule.sigma_min, again.schedule.sigma_max, again.sigma_data, again.prediction)
    assert found == (0.01, 50.0, 0.7, "edm")


@pytest.mark.parametrize(
    "denoiser",
    [
        Denoiser(DiscreteSchedule(), "flow"),
        Denoiser(FlowSchedule(), "v"),
        Denoiser(EDMSchedule(), "eps"),
        Denoiser(FlowSchedule(), "flow", learned_variance=True),
    ],
)
def test_what_no_scheduler_does_is_refused(denoiser):
    with pytest.raises(NotExpressible, match=denoiser.prediction):
        scheduler_config(denoiser)


def test_the_schedulers_of_published_pipelines():
    stable_diffusion = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    denoiser = built(denoiser_part(stable_diffusion, "here", learned_variance=False))
    assert torch.equal(
        denoiser.schedule.betas, DiscreteSchedule("linear", linear_start=0.00085, linear_end=0.012).betas
    )
    assert denoiser.prediction == "eps"
    assert sampling_defaults(stable_diffusion) == ({"sampler": "plms", "spacing": "uniform"}, [])
    of_xl = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    assert sampling_defaults(of_xl) == ({"sampler": "euler"}, ["the way it spaces its timesteps"])
    ddpm = {"_class_name": "DDPMScheduler"}
    assert sampling_defaults(ddpm)[0] == {"sampler": "ddpm", "spacing": "leading"}
    assert "clip_sample" in sampling_defaults(ddpm)[1][0]
    karras = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    assert sampling_defaults(karras)[1] == ["the way it spaces its sigmas"]
    shifted = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert sampling_defaults(shifted) == ({"sampler": "euler"}, ["the shift of its timesteps"])


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPC"),
        ({}, "None"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}, "sigmoid"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "other"}, "other"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
    ],
)
def test_schedulers_that_are_not_known_are_refused(config, reason):
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        denoiser_part(config, "here", learned_variance=False)
