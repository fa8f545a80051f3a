"""The scaling that turns the network's output into an estimate of the clean latent."""

from __future__ import annotations

from torch import Tensor


class VideoScaling:
    """Scaling for v-prediction (Salimans & Ho 2022, appendix D).

    The network predicts v = a noise - sqrt(1 - a^2) x_0, where a is the noise level. The network's
    input is not scaled (c_in = 1), and the network is given the timestep.
    """

    def __call__(self, alpha_cumprod_sqrt: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_skip and c_out of denoised = c_out * network(x) + c_skip * x.

        Both have the shape of the noise levels `alpha_cumprod_sqrt`, whose values are in [0, 1].
        """
        return alpha_cumprod_sqrt, -((1.0 - alpha_cumprod_sqrt**2) ** 0.5)
