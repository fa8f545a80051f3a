"""Training of the video autoencoder with PyTorch Lightning.

It is separate from the autoencoder, so that sampling does not import Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pytorch_lightning import LightningModule

from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper

# The key of the clips in a batch, as in batches of the diffusion model.
VIDEO_KEY = "mp4"


class TrainableVideoAutoencoder(VideoAutoencoderInferenceWrapper, LightningModule):
    """The autoencoder as a LightningModule.

    The arguments are the same as for `VideoAutoencoderInferenceWrapper`.

    Attributes:
        learning_rate: learning rate of Adam.
        kl_weight: weight of the KL term relative to the reconstruction loss.
    """

    learning_rate: float = 1e-4
    kl_weight: float = 1e-6

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> torch.Tensor:
        """Return reconstruction loss (L1 and squared error) plus weighted KL divergence.

        Decoding is streamed, so the norms see the same chunks as in sampling.

        Args:
            batch: its entry ``mp4`` holds clips (b, t, c, h, w) in [-1, 1] with 8k+1 frames.
            batch_idx: not used; Lightning passes it.

        Returns:
            The loss, a scalar in float32.
        """
        x = rearrange(batch[VIDEO_KEY], "b t c h w -> b c t h w")
        moments, _ = self.encode(x, unregularized=True)
        video, target = self.decode(self.regularization(moments)).float(), x.float()
        terms = {
            "l1": F.l1_loss(video, target),
            "mse": F.mse_loss(video, target),
            "kl": self.regularization.kl(moments),
        }
        loss = terms["l1"] + terms["mse"] + self.kl_weight * terms["kl"]
        if self._trainer is not None:  # without a trainer, self.log warns at every step
            for name, value in {**terms, "loss": loss}.items():
                self.log(f"train/{name}", value, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with the constant `learning_rate`."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
