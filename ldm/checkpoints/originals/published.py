"""Published models: a checkpoint of an original project with its YAML, loaded strictly.

The YAML's targets are looked up in tables (`compvis`, `sgm`, `openai`), never imported. What comes out is a
plain description in this toolkit's own terms, which is built without memory and then filled from the file.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints import building
from ldm.checkpoints.description import Description
from ldm.checkpoints.originals import compvis, openai, sgm
from ldm.checkpoints.originals.original_yaml import Original, Part, Translated, read_original
from ldm.checkpoints.strict import HARMLESS, check_keys, load_strict
from ldm.config import ConfigError
from ldm.config.signatures import resolve_target
from ldm.weights.errors import CheckpointError
from ldm.weights.reading import Weights, read_weights
from ldm.wording import some

log = logging.getLogger(__name__)

MODELS = compvis.MODELS | sgm.MODELS
EMA_PREFIX = "model_ema."
EMA_EXTRAS = ("decay", "num_updates")  # buffers of the averaging itself, beside the weights
_EMA = r"model_ema\..+"

#: Extra keys of published files, see `HARMLESS`.
PUBLISHED_HARMLESS = HARMLESS | {
    r"cond_stage_model\.loss\..+": "the first stage's loss, under its second name as the condition's model",
    r"(.+\.)?attn_mask": "the causal mask of older OpenCLIP text encoders, a constant",
    r"(.+\.)?colorize": "a random projection that displays segmentations",
}
# Where averaged weights are taken, those of the loss and the counters are all that may be left over.
_AVERAGED_HARMLESS = {pattern: why for pattern, why in PUBLISHED_HARMLESS.items() if pattern != _EMA} | {
    r"model_ema\.(decay|num_updates)": "counters of the averaging itself",
    r"model_ema\.loss.+": "averaged weights of the first stage's loss",
}


def load_published(
    path: str | Path,
    config: str | Path | Mapping,
    ema: bool = True,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model in a checkpoint of latent-diffusion, Stable Diffusion, sgm or OpenAI's diffusion projects.

    Args:
        path: .ckpt, .pt, .pth, .bin, .safetensors, or the index of shards.
        config: the original project's YAML, unchanged, or one of this toolkit with a `model:` or a bare
            `target:`; a file or its content.
        ema: take the averaged weights where the file has them.
        dtype: of the floating-point parameters; None is float32.

    Raises:
        ConfigError: all unknown or unsupported targets and parameters, with their paths in the YAML.
        CheckpointError: the file is damaged, unsafe, or has missing, extra or mis-shaped keys.
    """
    original = read_original(config)
    translated = translate(original)
    model = build_empty(translated, dtype, original.reading.origin)
    weights = read_weights(path)
    averaged = fill(model, translated, weights, ema, str(path))
    for note in original.reading.notes:
        log.info("%s: %s", original.reading.origin, note)
    step = weights.extra.get("global_step")
    model.description = Description(
        translated.node,
        weights="ema" if averaged else "raw",
        step=step if isinstance(step, int) else None,
        notes=original.reading.notes,
    )
    return model


def translate(original: Original) -> Translated:
    """An original's model in this toolkit's terms; a model that is in these terms already stays as it is.

    Raises:
        ConfigError: every unknown or unsupported target and parameter.
    """
    part, reading = original.model, original.reading
    try:
        found = _translate(part, original.diffusion)
    except ConfigError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        reading.problem(part.path or "target", f"values that make no sense: {type(error).__name__}: {error}")
    reading.check()
    return found


def _translate(part: Part, diffusion: dict | None) -> Translated:
    if part.target in openai.MODELS:
        return openai.network(part, diffusion)
    if diffusion is not None:
        part.reading.problem("diffusion", f"does not go with {part.target}")
    if part.target not in MODELS and _is_native(part.target):
        return Translated({"target": part.target, "params": part.params})
    return part.translator(MODELS | openai.MODELS, "model")(part)


def _is_native(target: str) -> bool:
    try:
        return issubclass(resolve_target(target), nn.Module)
    except (ValueError, TypeError):
        return False


def build_empty(
    translated: Translated, dtype: torch.dtype | None = None, origin: str = "the config"
) -> nn.Module:
    """The model without memory for its parameters (on the meta device), in eval mode; see `building`."""
    model = building.build_empty(translated.node, f"{origin} (in this toolkit's terms)")
    return model if dtype is None else model.to(dtype=dtype)


def fill(model: nn.Module, translated: Translated, weights: Weights, ema: bool, where: str) -> bool:
    """Put a file's weights into a model that `build_empty` made; True if they are the averaged ones."""
    view, tensors, name = translated.view(model), dict(weights.tensors), type(model).__name__
    # First: of a file that holds another model, the averages would be the lesser part of the matter.
    check_keys(view, tensors, ignore=PUBLISHED_HARMLESS, where=where, name=name)
    beginning = translated.averaged if ema else None
    averaged = beginning is not None and take_averaged(tensors, view, beginning, where)
    if translated.latent_scale is not None and not translated.scale_in_file:
        _check_scale(tensors.get("scale_factor"), translated.latent_scale, where)
    rules = _AVERAGED_HARMLESS if averaged else PUBLISHED_HARMLESS
    load_strict(view, tensors, ignore=rules, where=where, assign=True, name=name)
    if translated.scale_in_file:
        if not view.scale_factor:
            raise CheckpointError(where, "carries a scale_factor of 0, with which no latent can be decoded")
        model.latent_scale.fill_(view.scale_factor)
    return averaged


def take_averaged(tensors: dict[str, Tensor], view: nn.Module, beginning: str, where: str) -> bool:
    """Replace the parameters of a state dict, in place, by their averaged copies, if it has any.

    Those of `view` with this beginning of their names were averaged; the copies' names leave it out.
    """
    counters = {EMA_PREFIX + name for name in EMA_EXTRAS}
    if not any(name.startswith(EMA_PREFIX) and name not in counters for name in tensors):
        return False
    names = [name for name, _ in view.named_parameters() if name.startswith(beginning)]
    copies = ema_names(name.removeprefix(beginning) for name in names)
    missing = [f"{copy} (of {beginning}{name})" for copy, name in copies.items() if copy not in tensors]
    if missing:
        what = f"has averaged copies, but {len(missing)} are missing: {some(missing, 20)} (see ema=False)"
        raise CheckpointError(where, what)
    for copy, name in copies.items():
        tensors[beginning + name] = tensors.pop(copy)
    return True


def ema_names(parameter_names: Iterable[str]) -> dict[str, str]:
    """EMA key -> parameter name, for the parameters that were averaged.

    The original's averaging stores each parameter as a buffer, whose name may hold no dot, so it deletes
    every dot. That cannot be undone, hence the map is built forwards: `model_ema.` + the name, dotless.

    Raises:
        ValueError: two parameters have the same name once their dots are gone, or one that of a counter.
    """
    names: dict[str, str] = {}
    for name in parameter_names:
        key = EMA_PREFIX + name.replace(".", "")
        if key.removeprefix(EMA_PREFIX) in EMA_EXTRAS:
            raise ValueError(f"the EMA key {key!r} of {name!r} is a buffer of the averaging itself")
        if names.get(key, name) != name:
            raise ValueError(f"the parameters {names[key]!r} and {name!r} have the same EMA key {key!r}")
        names[key] = name
    return names


def _check_scale(found: Tensor | None, expected: float, where: str) -> None:
    """A scale that the file carries must be the YAML's: with another the images would be silently wrong."""
    if found is None:
        return
    if found.numel() != 1:
        raise CheckpointError(where, f"carries a scale_factor of shape {tuple(found.shape)}, not one number")
    if not abs(found.double().item() - expected) <= 1e-4 * abs(expected):  # nor may it be NaN
        what = f"carries scale_factor {found.item():.6g}, the config says {expected}: set scale_by_std: true"
        raise CheckpointError(where, what)
