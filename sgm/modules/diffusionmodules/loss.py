"""The training objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from sgm.modules.diffusionmodules.denoiser import Conditioning, DiscreteDenoiser, Network
from sgm.modules.diffusionmodules.discretizer import NoiseLevels
from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling
from sgm.util import check_number, instantiate_from_config


class VideoDiffusionLoss:
    """The squared error of the denoised latent, divided by 1 - a^2, where a is the noise level.

    This is equal to the squared error in v.

    Args:
        sigma_sampler_config: configuration node of the noise level sampler.
        offset_noise_level: standard deviation of additional noise that has one value per sample and
            channel, shared by all frames and pixels. It helps the model learn the mean brightness
            ("offset noise", N. Guttenberg 2023). 0 for the released weights.

    Raises:
        UserError: a value is out of range or a node is invalid.
    """

    def __init__(
        self, sigma_sampler_config: Mapping[str, Any], *, offset_noise_level: float = 0.0
    ) -> None:
        check_number("VideoDiffusionLoss: offset_noise_level", offset_noise_level, low=0)
        self.sigma_sampler: DiscreteSampling = instantiate_from_config(sigma_sampler_config)
        self.offset_noise_level = float(offset_noise_level)

    def __call__(
        self,
        network: Network,
        denoiser: DiscreteDenoiser,
        x: Tensor,
        cond: Conditioning,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss at random noise levels.

        Args:
            x: (b, t, c, h, w) clean latents, scaled; cast to float32.
            cond: conditioning of b samples.
            generator: source of all random numbers; None means PyTorch's default generators.

        Returns:
            (b,) float32, one mean per sample.
        """
        x = x.to(torch.float32)
        levels = self.sigma_sampler(x.shape[0], generator=generator)
        noise = self.draw_noise(x, generator=generator)
        return self.at_levels(network, denoiser, x, cond, levels=levels, noise=noise)

    def at_levels(
        self,
        network: Network,
        denoiser: DiscreteDenoiser,
        x: Tensor,
        cond: Conditioning,
        *,
        levels: NoiseLevels,
        noise: Tensor,
    ) -> Tensor:
        """Return the loss at given noise levels and with given noise.

        Args:
            x: (b, t, c, h, w) clean latents, scaled, float32.
            cond: conditioning of b samples.
            levels: noise levels of the b samples.
            noise: standard normal noise with the shape of `x`.

        Returns:
            (b,) float32, one mean per sample.
        """
        timesteps, signal = (drawn.to(x.device) for drawn in levels)
        noise_power = 1.0 - signal**2  # (b,) float64: near 0 at the cleanest noise levels
        x_noisy = _per_sample(signal, x) * x + _per_sample(noise_power**0.5, x) * noise
        denoised = denoiser(network, x_noisy, timesteps, cond, alpha_cumprod_sqrt=signal)
        assert denoised.shape == x.shape, (denoised.shape, x.shape)  # one text per clip
        error = (denoised - x) ** 2 * _per_sample(1.0 / noise_power, x)
        return reduce(error, "b t c h w -> b", "mean")

    def draw_noise(self, x: Tensor, *, generator: torch.Generator | None) -> Tensor:
        """Return noise for `x`, including the offset noise; drawn on the generator's device."""
        b, _, c, _, _ = x.shape
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, device=device)
        if self.offset_noise_level > 0.0:
            offset = torch.randn(b, 1, c, 1, 1, generator=generator, device=device)
            noise = noise + self.offset_noise_level * offset
        return noise.to(x.device)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    return rearrange(values.to(x.dtype), "b -> b 1 1 1 1")
