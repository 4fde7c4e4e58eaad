"""Where the steps of a sampler lie on a schedule."""

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import DiscreteSchedule, FlowSchedule

# From here up, Karras' spacing spends its steps on noise alone (a cosine schedule, a zero terminal SNR).
_KARRAS_BELOW = 200.0


def default_spacing(schedule, sampler: str) -> str | None:
    """How the steps of a sampler are spaced where nobody says; None for a schedule with one spacing.

    Over discrete timesteps, `linspace` (k-diffusion; improved-diffusion's respacing rounds the same times).
    `dpmpp_2m` extrapolates over ln(sigma), in which the last of these steps is far too long: it takes
    `karras`, or `trailing` where sigma starts too high.
    """
    if not isinstance(schedule, DiscreteSchedule):
        return None
    if sampler != "dpmpp_2m":
        return "linspace"
    return "karras" if schedule.sigmas_all[-1] < _KARRAS_BELOW else "trailing"


def sampling_sigmas(
    denoiser: Denoiser,
    steps: int,
    spacing: str | None = None,
    sampler: str = "euler",
    shift: float | None = None,
) -> Tensor:
    """The sigmas that a sampler walks, (steps + 1,), at this spacing or at the default one.

    Raises:
        ValueError: what the schedule refuses; a `shift` of a schedule that has none.
    """
    spacing = spacing or default_spacing(denoiser.schedule, sampler)
    options = {"spacing": spacing} if spacing else {}
    if shift is not None:
        if not isinstance(denoiser.schedule, FlowSchedule):
            name = type(denoiser.schedule).__name__
            raise ValueError(f"shift {shift:g} belongs to flow models (FlowSchedule), not to a {name}")
        options["shift"] = shift
    return denoiser.schedule.sigmas(steps, **options)
