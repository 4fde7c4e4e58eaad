"""Second stage: the diffusion model in the latent space."""

from torch import Tensor, nn

from ldm.diffusion.objective import Objective
from ldm.diffusion.random import normal, uniform
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.settings import TrainingSettings
from ldm.training.task import Task, mean_logs


class DiffusionTask(Task):
    """Trains `model.network` and `model.conditioner`; the first stage is frozen.

    Batches hold `position` (B,) and either `mean` and `std` of cached posteriors (B, C, h, w) or `image`
    (B, C, H, W) in [-1, 1], besides what the conditioner reads.
    """

    def __init__(
        self, model: LatentDiffusion, objective: Objective, settings: TrainingSettings, seed: int = 0
    ):
        super().__init__(settings, seed)
        model.first_stage_model.requires_grad_(False)
        self.model = self.averaged = model
        self.objective = objective
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.first_stage_model.eval()
        return self

    def optimized(self) -> list[list[nn.Parameter]]:
        return [[p for p in self.model.parameters() if p.requires_grad]]

    def update(self, batch: dict) -> dict[str, Tensor]:
        logs = []
        for i, part in enumerate(self.parts(batch)):
            out = self.errors(part, "train")
            self.backward_part(out["loss"].mean(), i)
            logs.append({"loss": out["loss"]})
        norm = self.optimizer_step(0)
        return {**mean_logs(logs), "grad_norm": norm}

    def errors(self, batch: dict, stream: str) -> dict[str, Tensor]:
        """The objective's per-sample results at the times, noises and drops of these positions."""
        positions, embedders = batch["position"], len(self.model.conditioner.embedders)
        noise, spread = normal(
            self.seed, f"{stream}/noise", positions, (2, *self.latent_shape(batch))
        ).unbind(1)
        draws = uniform(self.seed, f"{stream}/time", positions, (1 + embedders,)).T
        z = self.latents(batch, spread)
        cond = self.model.conditioner(batch, draws[1:] if stream == "train" else None)
        return self.objective(self.model.model, z, noise, draws[0], cond)

    def latent_shape(self, batch: dict) -> tuple[int, ...]:
        """(C, h, w) of this batch's latents."""
        if "mean" in batch:
            return tuple(batch["mean"].shape[1:])
        factor = self.model.first_stage_model.downsampling_factor
        return (self.model.latent_shape[0], *(side // factor for side in batch["image"].shape[-2:]))

    def latents(self, batch: dict, noise: Tensor) -> Tensor:
        """A sample of each posterior, normalised: z (B, C, h, w)."""
        if "mean" in batch:
            return self.model.normalize(batch["mean"] + batch["std"] * noise)
        return self.model.to_latent(batch["image"], noise)

    def measure(self, batch: dict) -> dict[str, Tensor]:
        return {"loss": self.errors(batch, "validation")["simple"]}
