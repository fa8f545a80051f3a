"""The weight of the squared error at each noise level."""

from __future__ import annotations

from torch import Tensor


class EpsWeighting:
    """Converts a squared error in the clean latent to a squared error in the noise (DDPM's loss).

    The denoiser has this weighting only because published configurations name it.
    `VideoDiffusionLoss` uses the weight 1 / (1 - a^2) instead, which stays positive if there is no
    signal.
    """

    def __call__(self, alpha_cumprod_sqrt: Tensor) -> Tensor:
        """Return the signal-to-noise ratio a^2 / (1 - a^2) (Ho et al. 2020, eq. 15), same shape."""
        alpha_cumprod = alpha_cumprod_sqrt**2
        return alpha_cumprod / (1.0 - alpha_cumprod)
