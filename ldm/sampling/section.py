"""The settings of sampling. A config is checked with them before torch is imported."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ldm.config import check_section, signatures
from ldm.config.annotations import mismatch
from ldm.wording import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.latent_diffusion import LatentDiffusion


@dataclass
class Sampling:
    """How a model is sampled: the section `sampling:` of a config, a model's own defaults, a request.

    sampler: a name in `ldm.diffusion.samplers.SAMPLERS`, or the dotted path of a function like those.
    steps: steps of the sampler; heun, and the first step of plms, call the network twice.
    guidance: classifier-free guidance; 1 is none, 0 the unconditional model.
    spacing: how the steps are spaced, see the schedule's `sigmas`; None is what the model was published with
        (`sampler_defaults`), else `default_spacing`.
    shift: how far the steps of a flow model are moved towards noise (`ldm.diffusion.schedule.shift_time`);
        `auto` follows from the latents' shape (`resolution_shift`), None is the schedule's own, 1.
    options: the sampler's own, such as `eta` of ddim: its keyword-only parameters. None says nothing.
    eta: the place of ddim's option in older files.

    Raises:
        ValueError: no such sampler, a sampler's option that it does not take, a number out of its range.
    """

    sampler: str = "euler"
    steps: int = 30
    guidance: float = 1.0
    spacing: str | None = None
    shift: float | Literal["auto"] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    eta: InitVar[float | None] = None

    def __post_init__(self, eta: float | None):
        options = {"eta": eta, **self.options}
        self.options = {name: value for name, value in options.items() if value is not None}
        if self.steps < 1:
            raise ValueError(f"steps must be a whole number from 1 on, got {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance} is no finite number")
        if self.shift not in (None, "auto") and not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a finite number above 0, got {self.shift}")
        _check_options(self.sampler, self.options)

    @classmethod
    def of(cls, model: "LatentDiffusion", sampler: str | None = None, **asked: Any) -> "Sampling":
        """What is asked for, else the model's own (`sampling` in its description), else the toolkit's.

        Args:
            asked: fields, None for those that are left open, and options of the sampler. Another sampler
                than the model's own gets neither its options nor its spacing.

        Raises:
            ValueError: as the class; also where the model's own sampler is code outside `ldm` that the user
                has not named himself.
        """
        own = dict(getattr(model, "description", {}).get("sampling") or {})
        if sampler not in (None, own.get("sampler", cls.sampler)):
            own = {name: own[name] for name in own if name not in ("sampler", "spacing", "options", "eta")}
        elif sampler is None:
            named = str(own.get("sampler"))
            if "." in named and named not in getattr(model, "trusted", ()):
                raise ValueError(f"the model's own sampler {named} is code outside ldm: name it yourself")
        if not model.conditioner.keys:
            own["guidance"] = 1.0
        settings = check_section(own, cls, "sampling")
        asked = {name: value for name, value in asked.items() if value is not None}
        changes = {name: asked.pop(name) for name in _FIELDS & asked.keys()}
        changes |= {"sampler": sampler or settings.sampler, "options": settings.options | asked}
        return replace(settings, **changes)

    def sigmas(self, model: "LatentDiffusion") -> "Tensor":
        """The sigmas that the sampler walks, (steps + 1,).

        Raises:
            ValueError: what the model's schedule refuses.
        """
        from ldm.diffusion.schedule import resolution_shift
        from ldm.sampling.spacing import sampling_sigmas

        spacing = self.spacing or model.sampler_defaults.get(self.sampler, {}).get("spacing")
        shift = resolution_shift(*model.latent_shape) if self.shift == "auto" else self.shift
        return sampling_sigmas(model.denoiser, self.steps, spacing, self.sampler, shift)

    def facts(self) -> dict[str, Any]:
        """What was said, in words for a file: the fields that are not None, the options among them."""
        named = {"sampler": self.sampler, "steps": self.steps, "guidance": self.guidance}
        named |= {"spacing": self.spacing, **self.options, "shift": self.shift}
        return {name: value for name, value in named.items() if value is not None}


_FIELDS = {f.name for f in fields(Sampling)} - {"sampler", "options"}
_HANDED_IN = {"noise_fn", "callback"}


def find_sampler(name: str) -> Callable:
    """The sampler of this name, or at this dotted path outside `ldm`.

    The path is imported: it must come from the user, never from a file of weights alone.

    Raises:
        ValueError: there is none, or it is no sampler.
    """
    from ldm.diffusion.samplers import SAMPLERS

    if name in SAMPLERS:
        return SAMPLERS[name]
    if "." not in name:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {name!r} is unknown; there are {known}" + did_you_mean(name, SAMPLERS))
    found = signatures.resolve_target(name, allow_foreign=True)
    accepted = signatures.parameters(found)
    if accepted is not None and not accepted.keys() >= _HANDED_IN:
        raise ValueError(f"sampler {name} must take (denoise, x, sigmas, *, noise_fn, callback, ...)")
    return found


def _own_options(sampler: Callable) -> dict[str, inspect.Parameter] | None:
    """A sampler's own options, read off its signature; None where any goes."""
    accepted = signatures.parameters(sampler)
    if accepted is None:
        return None
    return {n: p for n, p in accepted.items() if p.kind is p.KEYWORD_ONLY and n not in _HANDED_IN}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    import torch

    from ldm.diffusion.samplers import SAMPLERS

    sampler = find_sampler(name)
    own = _own_options(sampler)
    for option, value in options.items() if own is not None else ():
        if option not in own:
            others = [other for other, function in SAMPLERS.items() if option in _own_options(function)]
            what = f"belongs to the {' and '.join(others)} sampler, not to" if others else "is no option of"
            takes = ", ".join(own) or "no options of its own"
            hint = did_you_mean(option, [*own, *_FIELDS])
            raise ValueError(f"{option} {what} {name}, which takes {takes}{hint}")
        if problem := mismatch(value, own[option].annotation):
            raise ValueError(f"{option} of the sampler {name}: {problem}")
    if options:
        # The ranges are the sampler's to say: one step on a single number, from noise to nothing, asks it.
        x, sigmas = torch.zeros(1, 1, 1, 1), torch.tensor([1.0, 0.0], dtype=torch.float64)
        sampler(lambda x, sigma: x, x, sigmas, noise_fn=lambda *_: x, **options)
