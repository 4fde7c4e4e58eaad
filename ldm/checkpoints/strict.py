"""Load a state dict completely or not at all."""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ldm.checkpoints.key_report import KeyReport
from ldm.weights.errors import CheckpointError
from ldm.wording import some

#: The noise schedule's tables, which are computed anew from the config.
TABLES = {
    "betas|((sqrt_)?alphas_cumprod|alphas_cumprod_prev|(sqrt|log)_one_minus_alphas_cumprod"
    "|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12]))": "a table",
}
#: Extra keys that published checkpoints are known to have, for `re.fullmatch`, and why they may be left out;
#: only where the module has no such key.
HARMLESS = TABLES | {
    r"denoiser\.sigmas": "the noise levels of sgm's discrete denoiser, computed anew from the config",
    "logvar": "the original's per-timestep loss weight; only its training reads it",
    "scale_factor": "the scale of the latents with scale_by_std; whoever builds the model reads it first",
    "ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas|sigmas_for_original_num_steps)": "sampling's",
    r"(.+\.)?position_ids": "0, 1, 2, ...: a constant buffer of older text encoders",
    r"(first_stage_model\.)?loss\..+": "LPIPS and discriminator of the autoencoder's training",
    r"model_ema\..+": "averaged weights, where the raw ones were asked for",
}


class KeyMismatch(CheckpointError):
    """A state dict and a module do not fit; the module was not touched. Has the attributes of `KeyReport`."""

    def __init__(self, where: str, module: str, report: KeyReport):
        super().__init__(where, report.text(module))
        vars(self).update(vars(report))


class NonFiniteWeights(CheckpointError):
    """Weights, `names`, are NaN or infinite or become so in the module's type; it was not touched."""

    def __init__(self, where: str, names: list[str]):
        what = "tensors are NaN or infinite, or too large for the module's type"
        super().__init__(where, f"{len(names)} {what}: {some(names, 8)}")
        self.names = names


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    ignore: Collection[str] = (),
    where: str,
    assign: bool = False,
    name: str | None = None,
) -> None:
    """Copy a state dict into a module, every key of both sides accounted for.

    Everything is checked before the module is touched. Of a tied parameter one name suffices. Floating-point
    tensors are converted to the module's type; integers and bools must have it.

    Args:
        module: with parameters and persistent buffers named as in the file.
        tensors: the state dict, dots and all; prefixes are the caller's to strip.
        ignore: patterns of extra keys that may be left out, as in `HARMLESS`. A missing key is never ignored.
        where: the file, for messages.
        assign: put the tensors themselves into the module instead of copying their values; needed for a
            module on the meta device. Where types agree, its parameters are then views of the tensors.
        name: of the module in messages.

    Raises:
        KeyMismatch, NonFiniteWeights: with everything that does not fit.
        CheckpointError: `tensors` are on the meta device, or the module is and `assign` is False.
    """
    name = name or type(module).__name__
    targets = _targets(module, where)
    check_keys(targets, tensors, ignore=ignore, where=where, name=name)
    used = {key: tensor for key, tensor in tensors.items() if key in targets}
    if empty := [key for key, tensor in used.items() if tensor.is_meta]:
        raise CheckpointError(where, f"was read for its shapes only: {len(empty)} tensors have no data")
    if (meta := [key for key, target in targets.items() if target.is_meta]) and not assign:
        raise CheckpointError(where, f"needs assign=True for the meta device, where {some(meta, 1)} are")
    aliases = _aliases(targets)
    if contradictory := _contradictions(used, aliases):
        raise KeyMismatch(where, name, KeyReport(contradictory=contradictory))
    if broken := [key for key, tensor in used.items() if not _fits(tensor, targets[key].dtype)]:
        raise NonFiniteWeights(where, broken)
    if assign:
        _assign(module, targets, used, aliases)
        return
    with torch.no_grad():
        for key, tensor in used.items():
            targets[key].copy_(tensor)


def check_keys(
    targets: nn.Module | Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    *,
    ignore: Collection[str] = (),
    where: str,
    name: str,
) -> None:
    """Hold the names, shapes and types of a state dict against a module, or what stands for its parameters.

    Either may be on the meta device.

    Raises:
        KeyMismatch: as `load_strict`.
    """
    targets = _targets(targets, where) if isinstance(targets, nn.Module) else targets
    aliases = _aliases(targets)
    extra = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key not in targets}
    pairs = {key: (tensor, targets[key]) for key, tensor in tensors.items() if key in targets}
    absent = [key for key in targets if not any(alias in tensors for alias in aliases[key])]
    report = KeyReport(
        missing={key: tuple(targets[key].shape) for key in absent},
        extra={key: shape for key, shape in extra.items() if not ignored(key, ignore)},
        misshaped={k: (tuple(a.shape), tuple(b.shape)) for k, (a, b) in pairs.items() if a.shape != b.shape},
        mistyped={k: (a.dtype, b.dtype) for k, (a, b) in pairs.items() if not _convertible(a.dtype, b.dtype)},
    )
    if not report.empty:
        raise KeyMismatch(where, name, report)


def ignored(name: str, patterns: Collection[str] = HARMLESS) -> bool:
    """Whether an extra key of this name may be left out."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _targets(module: nn.Module, where: str) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers themselves."""
    targets = module.state_dict(keep_vars=True)
    if odd := [name for name, value in targets.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(where, f"{type(module).__name__} keeps state that is no tensor: {some(odd)}")
    return dict(targets)


def _aliases(targets: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Name -> all names of the same parameter, itself included."""
    groups: dict[int, list[str]] = {}
    for name, target in targets.items():
        groups.setdefault(id(target), []).append(name)
    return {name: groups[id(target)] for name, target in targets.items()}


def _contradictions(used: Mapping[str, Tensor], aliases: Mapping[str, list[str]]) -> list[str]:
    found = []
    for name, tensor in used.items():
        first = next(alias for alias in aliases[name] if alias in used)
        if first != name and not torch.equal(used[first], tensor.to(used[first])):
            found.append(f"{first} = {name}")
    return found


def _convertible(source: torch.dtype, target: torch.dtype) -> bool:
    """Between floating-point types, between complex ones, or not at all."""
    both_float = source.is_floating_point and target.is_floating_point
    return source == target or both_float or (source.is_complex and target.is_complex)


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite, also once converted to `dtype`."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    flat = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    real = dtype.to_real() if dtype.is_complex else dtype
    if flat.dtype.itemsize == 1:  # float8 has no comparison
        flat = flat.float()
    low, high = torch.aminmax(flat)  # NaN wins; needs no mask of the tensor's size
    extremes = torch.stack((low, high)).double()
    return bool((extremes.isfinite() & (extremes.abs() <= torch.finfo(real).max)).all())


def _assign(
    module: nn.Module,
    targets: Mapping[str, Tensor],
    used: Mapping[str, Tensor],
    aliases: Mapping[str, list[str]],
) -> None:
    owners = dict(module.named_modules(remove_duplicate=False))
    taken: set[int] = set()
    new: dict[str, Tensor] = {}  # by the first name that the file has, so that tied parameters stay tied
    for name, old in targets.items():
        source = next(alias for alias in aliases[name] if alias in used)
        if source not in new:
            own = _own(used[source], old, taken)
            is_parameter = isinstance(old, nn.Parameter)
            new[source] = nn.Parameter(own, requires_grad=old.requires_grad) if is_parameter else own
        path, _, leaf = name.rpartition(".")
        kept = owners[path]._parameters if isinstance(old, nn.Parameter) else owners[path]._buffers
        kept[leaf] = new[source]


def _own(tensor: Tensor, target: Tensor, taken: set[int]) -> Tensor:
    """A tensor for one parameter alone, on the module's device and in its type."""
    device = tensor.device if target.is_meta else target.device
    own = tensor.detach().to(device=device, dtype=target.dtype).contiguous()
    address = own.untyped_storage().data_ptr()
    if address in taken and own.numel():  # another parameter lives there already
        own = own.clone()
        address = own.untyped_storage().data_ptr()
    taken.add(address)
    return own
