"""Models built from a description without memory for their weights, to be filled from a file."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm import config as configuration
from ldm.checkpoints.errors import UnsupportedCheckpoint
from ldm.latent_diffusion import LatentDiffusion

WHOLE = "ldm.latent_diffusion.LatentDiffusion"
#: Parts of a LatentDiffusion that are all parameters; schedule and scale are computed, and need memory.
_EMPTY = ("first_stage", "network", "conditioner")


def build_unfilled(tree: Mapping[str, Any], where: str) -> nn.Module:
    """The model of a `{target, params}` tree on the meta device, in eval mode.

    `load_strict(assign=True)` fills it. Only targets inside `ldm.` are built: a file must not be able to name
    anything else.

    Raises:
        ConfigError: a target or parameter that does not exist.
        UnsupportedCheckpoint: the parts do not fit together.
    """
    loaded = configuration.loads(json.dumps({"model": tree}), origin=where)
    configuration.check(loaded, allow_foreign=False)
    try:
        if tree.get("target") != WHOLE:
            with torch.device("meta"):
                return configuration.instantiate(loaded.model).eval()
        parts = {}
        for name, value in configuration.to_plain(loaded.model).get("params", {}).items():
            is_part = isinstance(value, dict) and "target" in value
            with torch.device("meta" if name in _EMPTY else "cpu"):
                parts[name] = configuration.instantiate(loaded.model.params[name]) if is_part else value
        return LatentDiffusion(**parts).eval()
    except configuration.ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise UnsupportedCheckpoint(where, f"its parts do not fit together: {error}") from error
