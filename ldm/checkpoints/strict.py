"""Load a state dict completely or not at all."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.checkpoints.key_report import KeyReport, describe
from ldm.weights.errors import CheckpointError


@dataclass(frozen=True)
class IgnoreRule:
    """Extra keys of a file that may be left out, and why; `pattern` is for `re.fullmatch`."""

    pattern: str
    reason: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


# Extra keys that published checkpoints are known to have; ignored only where the module has no such key.
HARMLESS: tuple[IgnoreRule, ...] = (
    IgnoreRule(
        "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
        "|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance"
        "|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2",
        "the noise schedule's tables, computed anew from the config",
    ),
    IgnoreRule(
        r"denoiser\.sigmas", "the noise levels of sgm's discrete denoiser, computed anew from the config"
    ),
    IgnoreRule("logvar", "the original's per-timestep loss weight; only its training reads it"),
    IgnoreRule(
        "scale_factor", "the scale of the latents with scale_by_std; whoever builds the model reads it first"
    ),
    IgnoreRule(
        "ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas|sigmas_for_original_num_steps)",
        "the sampler's tables, which sampling left behind in the model",
    ),
    IgnoreRule(r"(.+\.)?position_ids", "0, 1, 2, ...: a constant buffer of older text encoders"),
    IgnoreRule(r"(first_stage_model\.)?loss\..+", "LPIPS and discriminator of the autoencoder's training"),
    IgnoreRule(r"model_ema\..+", "averaged weights, where the raw ones were asked for"),
)


class KeyMismatch(CheckpointError):
    """A state dict and a module do not fit; the module was not touched.

    Attributes:
        missing: name -> shape of what the module has and the file lacks.
        extra: name -> shape of what the file has and the module does not know.
        misshaped: name -> (shape in the file, shape in the module).
        mistyped: name -> (type in the file, type in the module), where no conversion keeps the meaning.
        contradictory: names of one tied parameter for which the file has different values.
    """

    def __init__(self, where: str, module: str, report: KeyReport):
        super().__init__(where, describe(report, module))
        self.missing = report.missing
        self.extra = report.extra
        self.misshaped = report.misshaped
        self.mistyped = report.mistyped
        self.contradictory = report.contradictory


class NonFiniteWeights(CheckpointError):
    """Weights that are NaN or infinite, or become so in the module's type; the module was not touched.

    Attributes:
        names: of the tensors.
    """

    def __init__(self, where: str, names: list[str]):
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        super().__init__(
            where,
            f"{len(names)} tensors are NaN or infinite, or too large for the module's type: {shown}. "
            "The training diverged, the file is damaged, or float16 is too narrow for it.",
        )
        self.names = names


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    ignore: Sequence[IgnoreRule] = (),
    where: str,
    assign: bool = False,
    name: str | None = None,
) -> None:
    """Copy a state dict into a module, every key of both sides accounted for.

    Everything is checked before the module is touched. Of a tied parameter one name suffices. Floating-point
    tensors are converted to the type that the module has; integers and bools must have the module's type
    exactly.

    Args:
        module: with parameters and persistent buffers named as in the file.
        tensors: the state dict, dots and all; prefixes are the caller's to strip.
        ignore: rules for extra keys that may be left out, such as `HARMLESS`. A missing key is never ignored.
        where: the file, for messages.
        assign: put the tensors themselves into the module instead of copying their values; needed for a
            module on the meta device, and saves memory. Where types agree, its parameters are then views of
            the tensors. Buffers that are not persistent are in no state dict and stay as they are.
        name: what to call the module in messages, where its class's name says little.

    Raises:
        KeyMismatch: keys are missing, extra, of another shape or type; it lists all of them.
        NonFiniteWeights: a tensor has NaN or infinite values.
        CheckpointError: `tensors` are on the meta device, or the module is and `assign` is False.
    """
    targets = _targets(module, where)
    used = {name: tensor for name, tensor in tensors.items() if name in targets}
    aliases = _aliases(targets)
    report = _compare(targets, tensors, ignore)
    _check_devices(targets, used, where, assign)
    if not report.empty:
        raise KeyMismatch(where, name or type(module).__name__, report)
    report.contradictory = _contradictions(used, aliases)
    if not report.empty:
        raise KeyMismatch(where, name or type(module).__name__, report)
    broken = [name for name, tensor in used.items() if not _fits(tensor, targets[name].dtype)]
    if broken:
        raise NonFiniteWeights(where, broken)
    if assign:
        _assign(module, targets, used, aliases)
    else:
        with torch.no_grad():
            for name, tensor in used.items():
                targets[name].copy_(tensor)


def check_shapes(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    ignore: Sequence[IgnoreRule] = (),
    where: str,
    name: str | None = None,
) -> None:
    """Hold the names, shapes and types of a state dict against a module, which may be on the meta device.

    Raises:
        KeyMismatch: as `load_strict`.
    """
    report = _compare(_targets(module, where), tensors, ignore)
    if not report.empty:
        raise KeyMismatch(where, name or type(module).__name__, report)


def _compare(
    targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], ignore: Sequence[IgnoreRule]
) -> KeyReport:
    """Everything but the values."""
    aliases = _aliases(targets)
    return KeyReport(
        missing={
            name: tuple(target.shape)
            for name, target in targets.items()
            if not any(alias in tensors for alias in aliases[name])
        },
        extra={
            name: tuple(tensor.shape)
            for name, tensor in tensors.items()
            if name not in targets and not any(rule.matches(name) for rule in ignore)
        },
        misshaped={
            name: (tuple(tensor.shape), tuple(targets[name].shape))
            for name, tensor in tensors.items()
            if name in targets and tensor.shape != targets[name].shape
        },
        mistyped={
            name: (tensor.dtype, targets[name].dtype)
            for name, tensor in tensors.items()
            if name in targets and not _convertible(tensor.dtype, targets[name].dtype)
        },
    )


def ignored_keys(names: Iterable[str], rules: Sequence[IgnoreRule] = HARMLESS) -> dict[str, str]:
    """Name -> reason, for the names that a rule lets pass."""
    found = {}
    for name in names:
        rule = next((rule for rule in rules if rule.matches(name)), None)
        if rule is not None:
            found[name] = rule.reason
    return found


def _targets(module: nn.Module, where: str) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers themselves."""
    targets = module.state_dict(keep_vars=True)
    odd = [name for name, value in targets.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(
            where, f"{type(module).__name__} keeps state that is no tensor: {', '.join(odd)}"
        )
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


def _check_devices(
    targets: Mapping[str, Tensor], used: Mapping[str, Tensor], where: str, assign: bool
) -> None:
    empty = [name for name, tensor in used.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(where, f"was read for its shapes only: {len(empty)} tensors have no data")
    meta = [name for name, target in targets.items() if target.is_meta]
    if meta and not assign:
        raise CheckpointError(
            where,
            f"cannot be copied into {len(meta)} parameters on the meta device, such as {meta[0]}; "
            "use assign=True",
        )


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
    for name in targets:
        source = next(alias for alias in aliases[name] if alias in used)
        if source not in new:
            new[source] = _own(used[source], targets[name], taken)
        path, _, leaf = name.rpartition(".")
        target = new[source]
        if isinstance(targets[name], nn.Parameter):
            if not isinstance(target, nn.Parameter):
                target = new[source] = nn.Parameter(target, requires_grad=targets[name].requires_grad)
            owners[path]._parameters[leaf] = target
        else:
            owners[path]._buffers[leaf] = target


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
