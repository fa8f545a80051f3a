"""Scaling of the network's output to an estimate of the clean latent."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scaling(NamedTuple):
    """Factors of denoised = c_out * network(x) + c_skip * x, in the shape of the noise levels."""

    c_skip: Tensor
    c_out: Tensor


class VideoScaling:
    """Scaling for v-prediction (Salimans & Ho 2022, appendix D).

    The network predicts v = a noise - sqrt(1 - a^2) x_0. Its input is not scaled (c_in = 1), and
    its time is the timestep itself.
    """

    def __call__(self, alpha_cumprod_sqrt: Tensor) -> Scaling:
        """Return the factors for noise levels `alpha_cumprod_sqrt`, any shape, values 0..1."""
        return Scaling(c_skip=alpha_cumprod_sqrt, c_out=-((1.0 - alpha_cumprod_sqrt**2) ** 0.5))
