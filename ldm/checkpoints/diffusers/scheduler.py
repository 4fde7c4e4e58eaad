"""Noise schedules and prediction types as a diffusers `scheduler_config.json`, from ours and to ours.

Names differ: diffusers' `scaled_linear` is the original LDM's `linear`, and its `linear` is `sqrt_linear`.
The original DDIM's end points need clip_sample=False, set_alpha_to_one=False and steps_offset=1 with leading
timesteps.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ldm.arguments import arguments_of
from ldm.checkpoints.description import NotExpressible, node
from ldm.checkpoints.diffusers.model_config import choice
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, make_betas
from ldm.weights.errors import UnsupportedCheckpoint

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_TO_PREDICTION = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
_BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
_TO_BETAS = {ours: theirs for theirs, ours in _BETAS.items()}
_TABLE = {"num_train_timesteps": "timesteps", "beta_start": "linear_start", "beta_end": "linear_end"}
_COSINE_S = 8e-3

_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
}
_FLOW = "FlowMatchEulerDiscreteScheduler"
_EDM = "EDMEulerScheduler"
CLASSES = (*_SAMPLERS, _FLOW, _EDM)

# What diffusers takes where a config says nothing.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "clip_sample": True,
    "thresholding": False,
    "timestep_spacing": "leading",
}


def scheduler_config(denoiser: Denoiser, sampling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of the scheduler that samples as this denoiser is sampled here, `_class_name` included.

    `sampling` are its defaults (`sampler`, `spacing`). NotExpressible where no scheduler has this schedule
    with this prediction.
    """
    schedule, prediction = denoiser.schedule, denoiser.prediction
    if isinstance(schedule, FlowSchedule) and prediction == "flow" and not denoiser.learned_variance:
        return {"_class_name": _FLOW, "num_train_timesteps": 1000, "shift": 1.0}
    if isinstance(schedule, EDMSchedule) and prediction == "edm" and not denoiser.learned_variance:
        return {"_class_name": _EDM, "sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max,
                "sigma_data": denoiser.sigma_data, "prediction_type": "epsilon", "rho": 7.0}  # fmt: skip
    if not isinstance(schedule, DiscreteSchedule) or prediction not in _TO_PREDICTION:
        learned = " with a learned variance" if denoiser.learned_variance else ""
        reasons = [f"prediction {prediction!r} on a {type(schedule).__name__}{learned}"]
        raise NotExpressible("no scheduler of diffusers fits", reasons)
    return {**_discrete_class(denoiser, dict(sampling or {})), **_discrete_betas(schedule),
            "prediction_type": _TO_PREDICTION[prediction]}  # fmt: skip


def _discrete_betas(schedule: DiscreteSchedule) -> dict[str, Any]:
    made = arguments_of(schedule)
    config = {"num_train_timesteps": schedule.timesteps}
    if made["zero_terminal_snr"]:
        config["rescale_betas_zero_snr"] = True
    name, ends = made["schedule"], (made["linear_start"], made["linear_end"])
    betas = made["betas"]
    if betas is None and (name not in _TO_BETAS or (name == "cosine" and made["cosine_s"] != _COSINE_S)):
        betas = make_betas(name, made["timesteps"], *ends, made["cosine_s"])
    if betas is not None:
        return config | {"trained_betas": torch.as_tensor(betas, dtype=torch.float64).tolist()}
    config["beta_schedule"] = _TO_BETAS[name]
    return config if name == "cosine" else config | dict(zip(("beta_start", "beta_end"), ends, strict=True))


def _discrete_class(denoiser: Denoiser, sampling: dict[str, Any]) -> dict[str, Any]:
    """Class, and how it spaces its steps: as `spacing` asks, else as this schedule does by default."""
    spacing, sampler = sampling.get("spacing") or "trailing", sampling.get("sampler")
    common = {
        "timestep_spacing": "trailing" if spacing == "trailing" else "leading",
        "steps_offset": 1 if spacing == "uniform" else 0,
    }
    if denoiser.learned_variance or sampler == "ddpm":
        # No other scheduler of diffusers reads a learned variance.
        variance = "learned_range" if denoiser.learned_variance else "fixed_small"
        return {"_class_name": "DDPMScheduler", "variance_type": variance, "clip_sample": False, **common}
    common["set_alpha_to_one"] = spacing != "uniform"
    if sampler == "plms" and denoiser.prediction != "x0" and not denoiser.schedule.zero_terminal_snr:
        return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **common}
    # DDIM at eta 0 is what `euler` is here; any other scheduler of diffusers can be made from this config.
    return {"_class_name": "DDIMScheduler", "clip_sample": False, **common}


def denoiser_part(config: Mapping[str, Any], where: str, learned_variance: bool) -> dict[str, Any]:
    """Target and params of the denoiser that a scheduler config stands for; another class, or an option that
    changes the schedule, is an UnsupportedCheckpoint.
    """
    name, values = config.get("_class_name"), {**_DEFAULTS, **config}

    def denoiser(prediction: str, schedule: dict, **more: Any) -> dict[str, Any]:
        made = {"schedule": schedule, "prediction": prediction, "learned_variance": learned_variance}
        return node("diffusion.denoiser.Denoiser", **made, **more)

    if name == _FLOW:
        return denoiser("flow", node("diffusion.schedule.FlowSchedule"))
    if name == _EDM:
        choice(values, "prediction_type", {"epsilon": "edm"}, where)
        ends = {"sigma_min": config.get("sigma_min", 0.002), "sigma_max": config.get("sigma_max", 80.0)}
        schedule = node("diffusion.schedule.EDMSchedule", **ends)
        return denoiser("edm", schedule, sigma_data=config.get("sigma_data", 0.5))
    if name not in _SAMPLERS:
        raise UnsupportedCheckpoint(where, f"is a {name}; known are {', '.join(CLASSES)}")
    prediction = choice(values, "prediction_type", _PREDICTIONS, where)
    if values["trained_betas"] is not None:
        params = {"betas": [float(beta) for beta in values["trained_betas"]]}
    else:
        params = {ours: values[theirs] for theirs, ours in _TABLE.items()}
        params["schedule"] = choice(values, "beta_schedule", _BETAS, where)
    params["zero_terminal_snr"] = bool(values["rescale_betas_zero_snr"])
    return denoiser(prediction, node("diffusion.schedule.DiscreteSchedule", **params))


def sampling_defaults(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(defaults for sampling: `sampler` and, where there is the same, `spacing`; what has no counterpart)."""
    name, values, lost = config["_class_name"], {**_DEFAULTS, **config}, []
    if name in (_FLOW, _EDM):
        shifted = config.get("shift", 1.0) != 1.0 or config.get("use_dynamic_shifting")
        return {"sampler": "euler"}, ["the shift of its timesteps"] if name == _FLOW and shifted else []
    sampling = {"sampler": _SAMPLERS[name]}
    if name == "EulerDiscreteScheduler":
        values["timestep_spacing"] = config.get("timestep_spacing", "linspace")
        if any(config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta")):
            return sampling, ["the way it spaces its sigmas"]
    to_zero = name in ("DDPMScheduler", "EulerDiscreteScheduler") or values.get(
        "set_alpha_to_one", name == "DDIMScheduler"
    )
    key = (values["timestep_spacing"], values["steps_offset"], bool(to_zero))
    spacing = {("leading", 1, False): "uniform", ("leading", 0, True): "leading"}.get(key)
    if values["timestep_spacing"] == "trailing" and to_zero:
        spacing = "trailing"
    if spacing is None:
        lost.append("the way it spaces its timesteps")
    else:
        sampling["spacing"] = spacing
    if name in ("DDIMScheduler", "DDPMScheduler") and (values["clip_sample"] or values["thresholding"]):
        lost.append("the clipping of its predictions (clip_sample or thresholding)")
    return sampling, lost
