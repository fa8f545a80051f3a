"""The denoiser computes an estimate of the clean latent, for samplers and the loss."""

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
# dtype. The conditioning has k * b samples for k guidance branches, concatenated branch by branch;
# k is 1 without guidance. All branches get the same clips, so the network computes shared parts
# only once.
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


class DiscreteDenoiser:
    """Estimates the clean latent; rounds the noise level to the nearest level of the training.

    Rounding has an effect only in sampling. A schedule with few steps has other noise levels than
    the `num_idx` levels of the training (see `ZeroSNRDDPMDiscretization`).

    Args:
        num_idx: number of noise levels in the training, 2..1000; 1000 for the released weights.
        weighting_config, scaling_config, discretization_config: configuration nodes.
        quantize_c_noise: must be false, because the network is given the timestep.

    Raises:
        UserError: a value is out of range or a node is invalid.
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
                "DiscreteDenoiser: quantize_c_noise=true is not supported, because the network "
                "is given the timestep; set it to false in the configuration"
            )
        self.weighting = instantiate_from_config(weighting_config)
        self.scaling = instantiate_from_config(scaling_config)
        # A plain attribute, because a buffer would be cast to half precision with the network.
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
        """Estimate the clean latent from `x` at its noise level.

        Args:
            x: (b, t, c, h, w) noisy latent, float32; the network casts it to its own dtype.
            timesteps: (b,) int64, 0..999, passed to the network unchanged.
            cond: conditioning of k * b samples for k guidance branches, branch by branch.
            alpha_cumprod_sqrt: (b,) float64, the noise level of `x`, on the device of `x`.

        Returns:
            (k * b, t, c, h, w) float32.
        """
        # Moved only once, because copying from host memory at each step would wait for the device.
        self._levels = self._levels.to(alpha_cumprod_sqrt.device)
        distances = (rearrange(alpha_cumprod_sqrt, "b -> b 1") - self._levels).abs()  # (b, num_idx)
        nearest_level = self._levels[torch.argmin(distances, dim=1)]  # (b,)
        c_skip, c_out = self.scaling(nearest_level)
        c_skip = rearrange(c_skip.to(x.dtype), "b -> b 1 1 1 1")
        c_out = rearrange(c_out.to(x.dtype), "b -> b 1 1 1 1")
        # The estimate is a difference of nearly equal terms, so it is computed in float32.
        prediction = network(x, timesteps, cond).to(x.dtype)  # (k * b, t, c, h, w)
        branches = prediction.unflatten(0, (-1, len(x)))
        return (branches * c_out + x * c_skip).flatten(0, 1)
