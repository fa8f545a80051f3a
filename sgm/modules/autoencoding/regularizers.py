"""The regularizer, which draws latents and computes their KL divergence from the prior."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Limits of the log-variance. Below, the variance is negligible; above, exp() overflows in float16.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


class DiagonalGaussianRegularizer(nn.Module):
    """Models the latents as independent Gaussians; training pulls them towards N(0, 1).

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2013), section 3 and appendix B.
    """

    def forward(self, moments: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Draw latents: mean + standard deviation · noise.

        Args:
            moments: (b, 2z, t, h, w), z channels of mean, then z of log-variance.
            noise: (b, z, t, h, w), standard normal; None draws it from PyTorch's global generator
                for the device of `moments`.

        Returns:
            Latents (b, z, t, h, w) in the dtype of `moments`, computed in float32.
        """
        mean, log_variance = split_moments(moments)
        if noise is None:
            noise = torch.randn(mean.shape, device=mean.device)
        noise = noise.to(device=mean.device, dtype=torch.float32)
        return (mean + torch.exp(0.5 * log_variance) * noise).to(moments.dtype)

    def kl(self, moments: Tensor) -> Tensor:
        """Return the latents' KL divergence from N(0, 1), averaged over all elements, in nats."""
        mean, log_variance = split_moments(moments)
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Split `moments` (b, 2z, …) into mean and clamped log-variance, (b, z, …) each, in float32."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
