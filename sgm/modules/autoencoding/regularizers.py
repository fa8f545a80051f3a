"""The regularizer: draws latents from their moments; KL divergence from the prior."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Range of the log-variance. Beyond it, exp() overflows in float16, or the variance is negligible.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


class DiagonalGaussianRegularizer(nn.Module):
    """Distribution of the latents: independent Gaussians, pulled towards N(0, 1) in training.

    Kingma and Welling, "Auto-Encoding Variational Bayes" (2013), section 3 and appendix B.
    """

    def forward(self, moments: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Draw latents: mean + standard deviation · noise.

        Args:
            moments: (b, 2z, t, h, w), mean, then log-variance.
            noise: (b, z, t, h, w), standard normal; None draws it from PyTorch's global generator
                of the device of `moments`.

        Returns:
            (b, z, t, h, w) in the dtype of `moments`; computed in float32.
        """
        mean, log_variance = split_moments(moments)
        if noise is None:
            noise = torch.randn(mean.shape, device=mean.device)
        noise = noise.to(device=mean.device, dtype=torch.float32)
        return (mean + torch.exp(0.5 * log_variance) * noise).to(moments.dtype)

    def kl(self, moments: Tensor) -> Tensor:
        """Return the KL divergence of the latents from N(0, 1), mean over all elements, in nats."""
        mean, log_variance = split_moments(moments)
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(b, 2z, t, h, w) → mean and clamped log-variance, (b, z, t, h, w) each, in float32."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
