"""Weighting of the error of an estimate at each noise level."""

from __future__ import annotations

from torch import Tensor


class EpsWeighting:
    """Weight that turns a squared error in the clean latent into one in the noise (DDPM's loss).

    Published configurations name it, so the denoiser holds one. `VideoDiffusionLoss` does not use
    it: its own weight is 1 / (1 - a^2), which stays positive where there is no signal.
    """

    def __call__(self, alpha_cumprod_sqrt: Tensor) -> Tensor:
        """Return the signal-to-noise ratio a^2 / (1 - a^2) (Ho et al. 2020, eq. 15), same shape."""
        alpha_cumprod = alpha_cumprod_sqrt**2
        return alpha_cumprod / (1.0 - alpha_cumprod)
