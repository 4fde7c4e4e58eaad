"""Read the reference numbers under `tests/reference` (computed by other implementations)."""

import importlib.util
import json
import os
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

ROOT = Path(__file__).parent / "reference"

#: By test, what `relative_error` found at most; `--largest-errors` prints it.
LARGEST_ERRORS: dict[str, float] = {}

_spec = importlib.util.spec_from_file_location("reference_fill", ROOT / "fill.py")
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)
filled, filled_state_dict, noise = _fill.filled, _fill.filled_state_dict, _fill.noise


def load_config(folder: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(ROOT / folder / "config.yaml"), resolve=True)


def load_cases(folder: str) -> dict[str, torch.Tensor]:
    return load_file(ROOT / folder / "cases.safetensors")


def load_keys(folder: str) -> dict[str, list[int]]:
    return json.loads((ROOT / folder / "keys.json").read_text())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude; shapes must agree."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}")
    difference = (actual.double() - expected.double()).abs().max()
    error = (difference / expected.double().abs().max().clamp_min(1e-12)).item()
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    LARGEST_ERRORS[test] = max(error, LARGEST_ERRORS.get(test, 0.0))
    return error
