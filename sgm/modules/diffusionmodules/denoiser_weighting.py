"""How much the error of an estimate counts at each noise level."""

from __future__ import annotations

from torch import Tensor


class EpsWeighting:
    """Turns an error in the clean latent into the error in the noise: the loss of DDPM.

    Configurations name it, and the denoiser holds it for a loss that wants it; `VideoDiffusionLoss`
    weights by 1 / (1 - a^2) instead, which stays positive where there is no signal.
    """

    def __call__(self, alpha_cumprod_sqrt: Tensor) -> Tensor:
        """The signal-to-noise ratio a^2 / (1 - a^2) (Ho et al. 2020, eq. 15), of the same shape."""
        alpha_cumprod = alpha_cumprod_sqrt**2
        return alpha_cumprod / (1.0 - alpha_cumprod)
