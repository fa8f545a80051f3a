"""Schedules of noise levels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgm.util import check_number

NUM_TIMESTEPS = 1000
# First and last beta of latent diffusion. The square root of beta is linear between them (Rombach
# et al. 2022, app. B).
BETA_START = 0.00085
BETA_END = 0.012


class NoiseLevels(NamedTuple):
    """The n noise levels of a schedule, or randomly drawn noise levels of n samples.

    Attributes:
        timesteps: (n,) int64, 0..999; the network is conditioned on the timestep.
        alphas_cumprod_sqrt: (n,) float64, within [0, 1); 0 means no signal at all.
    """

    timesteps: Tensor
    alphas_cumprod_sqrt: Tensor


class ZeroSNRDDPMDiscretization:
    """DDPM noise levels, shifted towards noise and rescaled to zero terminal SNR.

    The shift is the one used for resolution-dependent schedules (Esser et al. 2024, section 5.3.2),
    applied to the cumulative alpha. Zero terminal SNR follows Lin et al. 2023, algorithm 1. Like in
    the sampler of the released weights, the levels of a run are selected first and rescaled
    afterwards. So the noise levels of a 10-step run are not a subset of the 1000 noise levels.

    Args:
        shift_scale: s in alpha <- alpha / (s + (1 - s) alpha), 0.001..1000; 1 means no shift.

    Raises:
        UserError: `shift_scale` is out of range.
    """

    def __init__(self, shift_scale: float = 1.0) -> None:
        check_number(f"{type(self).__name__}: shift_scale", shift_scale, low=1e-3, high=1e3)
        betas = np.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=np.float64) ** 2
        alphas_cumprod = np.cumprod(1.0 - betas)
        self._alphas_cumprod = alphas_cumprod / (shift_scale + (1.0 - shift_scale) * alphas_cumprod)

    def __call__(self, num_levels: int) -> NoiseLevels:
        """Return a schedule of `num_levels` noise levels, cleanest first.

        The timesteps are evenly spaced and end at 999. The noisiest level has no signal.

        Raises:
            UserError: `num_levels` is not in 2..1000. One noise level is not enough, because the
                cleanest level must have signal and the noisiest must not.
        """
        name = "number of noise levels (num_steps or num_idx)"
        check_number(name, num_levels, low=2, high=NUM_TIMESTEPS, whole=True)
        descending = np.linspace(NUM_TIMESTEPS - 1, 0, int(num_levels), endpoint=False)
        timesteps = descending.astype(np.int64)[::-1].copy()  # PyTorch needs positive strides
        signal = np.sqrt(self._alphas_cumprod[timesteps])
        cleanest, noisiest = signal[0], signal[-1]
        signal = (signal - noisiest) * (cleanest / (cleanest - noisiest))
        return NoiseLevels(
            timesteps=torch.from_numpy(timesteps), alphas_cumprod_sqrt=torch.from_numpy(signal)
        )
