"""From a network to an estimate of the clean latent: the one call that samplers and loss make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sgm.errors import UserError
from sgm.util import instantiate_from_config

# What the network is conditioned on; "crossattn" holds the text embedding (b, n_text, d_text).
Conditioning = dict[str, Tensor]
# network(x (b, t, c, h, w), timesteps (b,) int64, conditioning) -> (k * b, t, c, h, w), any float
# dtype. The conditioning is of k * b samples, those of the first branch of guidance first: all
# branches see the same clips, which the network can make use of. Without guidance k is 1.
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


class DiscreteDenoiser:
    """Estimates the clean latent; the noise level is rounded to one of the training's levels.

    The rounding matters in sampling only: a schedule of few steps has levels of its own (see
    `ZeroSNRDDPMDiscretization`), while the network learnt its scaling on `num_idx` levels.

    Args:
        num_idx: number of levels in the table, 2..1000; 1000 for the released weights.
        weighting_config, scaling_config, discretization_config: nodes of a configuration.
        quantize_c_noise: must be false; the network is told the timestep that it is called at.

    Raises:
        UserError: a value is out of range or a node is faulty.
    """

    def __init__(
        self,
        num_idx: int,
        weighting_config: Mapping[str, Any],
        *,
        scaling_config: Mapping[str, Any],
        discretization_config: Mapping[str, Any],
        quantize_c_noise: bool = False,
    ) -> None:
        if quantize_c_noise:
            raise UserError(
                "DiscreteDenoiser: quantize_c_noise=true is not supported, since the network is "
                "told the timestep itself; set it to false in the configuration"
            )
        self.weighting = instantiate_from_config(weighting_config)
        self.scaling = instantiate_from_config(scaling_config)
        # A plain attribute: a module's buffer would turn to half precision with the network.
        self._levels = instantiate_from_config(discretization_config)(num_idx).alphas_cumprod_sqrt

    def __call__(
        self,
        network: Network,
        x: Tensor,
        timesteps: Tensor,
        cond: Conditioning,
        *,
        alpha_cumprod_sqrt: Tensor,
    ) -> Tensor:
        """The estimate of the clean latent at the noise level of `x`.

        Args:
            x: (b, t, c, h, w) noisy latent, float32; the network casts it to its own dtype.
            timesteps: (b,) int64, 0..999, handed to the network as they are.
            cond: tensors of k * b samples, the k branches of guidance one after the other.
            alpha_cumprod_sqrt: (b,) float64, the level of `x` itself, on its device.

        Returns:
            (k * b, t, c, h, w) float32.
        """
        c_skip, c_out = self.scaling(self._nearest_level(alpha_cumprod_sqrt))
        c_skip = rearrange(c_skip.to(x.dtype), "b -> b 1 1 1 1")
        c_out = rearrange(c_out.to(x.dtype), "b -> b 1 1 1 1")
        # The estimate is a difference of near-equal terms: a half-precision sum would lose it.
        prediction = network(x, timesteps, cond).to(x.dtype)  # (k * b, t, c, h, w)
        branches = prediction.unflatten(0, (-1, len(x)))
        return (branches * c_out + x * c_skip).flatten(0, 1)

    def _nearest_level(self, alpha_cumprod_sqrt: Tensor) -> Tensor:
        # Moved once per run: copying host memory at every step would wait for the device.
        self._levels = self._levels.to(alpha_cumprod_sqrt.device)
        distances = (rearrange(alpha_cumprod_sqrt, "b -> b 1") - self._levels).abs()  # (b, num_idx)
        return self._levels[torch.argmin(distances, dim=1)]  # (b,)
