"""What DeepSpeed trains: the transformer with its loss, and nothing else of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusion_video import SATVideoDiffusionEngine


class TrainingObjective(nn.Module):
    """The loss of latents. Its weights are the transformer's, named as in SAT checkpoints.

    Autoencoder and text encoder stay outside: DeepSpeed would change their precision, divide them
    among processes and save them. Only a text encoder with ``is_trainable`` joins in.
    """

    def __init__(self, engine: SATVideoDiffusionEngine) -> None:
        super().__init__()
        self.model = engine.model
        self.denoiser = engine.denoiser
        self.loss_fn = engine.loss_fn
        if engine.conditioner.is_trained:
            self.conditioner = engine.conditioner

    def forward(self, latents: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of latents (b, t, c, h, w), scaled, with conditioning of b samples."""
        return self.loss_fn(self.model, self.denoiser, latents, cond).mean()
