"""Names of averaged weights in checkpoints of the original LDM and its descendants."""

from collections.abc import Iterable

EMA_PREFIX = "model_ema."
EMA_EXTRAS = ("decay", "num_updates")  # buffers of the averaging itself, beside the weights


def ema_names(parameter_names: Iterable[str]) -> dict[str, str]:
    """EMA key -> parameter name, for the parameters that were averaged.

    The original's averaging stores each parameter as a buffer, whose name may hold no dot, so it deletes
    every dot. That cannot be undone, hence the map is built forwards: `model_ema.` + the name, dotless.

    Args:
        parameter_names: as in the module that was averaged. The original averages `model`, the wrapper of the
            UNet, so its names begin with `diffusion_model.`; an autoencoder's averages the whole of itself.

    Raises:
        ValueError: two parameters have the same name once their dots are gone, or one takes the name of the
            averaging's own `decay` or `num_updates`.
    """
    names: dict[str, str] = {}
    for name in parameter_names:
        key = EMA_PREFIX + name.replace(".", "")
        if key.removeprefix(EMA_PREFIX) in EMA_EXTRAS:
            raise ValueError(
                f"the EMA key {key!r} of the parameter {name!r} is a buffer of the averaging itself"
            )
        if names.get(key, name) != name:
            raise ValueError(f"the parameters {names[key]!r} and {name!r} have the same EMA key {key!r}")
        names[key] = name
    return names
