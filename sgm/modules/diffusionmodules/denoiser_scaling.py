"""How a network's output becomes an estimate of the clean latent."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scaling(NamedTuple):
    """denoised = c_out * network(x) + c_skip * x; both of the noise levels' shape."""

    c_skip: Tensor
    c_out: Tensor


class VideoScaling:
    """v-prediction (Salimans & Ho 2022, appendix D): the network answers a noise - sqrt(1-a^2) x_0.

    The network's input is not scaled (c_in = 1) and its time is the timestep itself.
    """

    def __call__(self, alpha_cumprod_sqrt: Tensor) -> Scaling:
        """The factors at the noise levels `alpha_cumprod_sqrt`, any shape, values 0..1."""
        return Scaling(c_skip=alpha_cumprod_sqrt, c_out=-((1.0 - alpha_cumprod_sqrt**2) ** 0.5))
