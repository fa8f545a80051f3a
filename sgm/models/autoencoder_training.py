"""A training step of the video autoencoder, for PyTorch Lightning.

Apart from the autoencoder itself, so that sampling need not import Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pytorch_lightning import LightningModule

from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper

# Where a batch keeps its clips: the same batches as those of the diffusion model.
VIDEO_KEY = "mp4"


class TrainableVideoAutoencoder(VideoAutoencoderInferenceWrapper, LightningModule):
    """The autoencoder as a LightningModule, with the arguments of the one for inference.

    Attributes:
        learning_rate: of Adam.
        kl_weight: of the KL term beside the reconstruction.
    """

    learning_rate: float = 1e-4
    kl_weight: float = 1e-6

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> torch.Tensor:
        """Reconstruction loss (L1 and squared error) and weighted KL divergence.

        Decoding is streamed as in sampling, so that the norms see the chunks that they will see.

        Args:
            batch: with ``mp4``, clips (b, t, c, h, w) in [-1, 1] of 8k+1 frames.
            batch_idx: not needed; Lightning passes it.

        Returns:
            The loss, a scalar in float32.
        """
        x = rearrange(batch[VIDEO_KEY], "b t c h w -> b c t h w")
        reconstruction = self(x)
        video, target = reconstruction.video.float(), x.float()
        terms = {
            "l1": F.l1_loss(video, target),
            "mse": F.mse_loss(video, target),
            "kl": self.regularization.kl(reconstruction.moments),
        }
        loss = terms["l1"] + terms["mse"] + self.kl_weight * terms["kl"]
        if self._trainer is not None:  # self.log warns at every step without one
            for name, value in {**terms, "loss": loss}.items():
                self.log(f"train/{name}", value, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at the constant `learning_rate`."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
