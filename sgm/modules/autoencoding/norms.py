"""GroupNorm as the autoencoder uses it, plain and modulated by the latents."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn

from sgm.errors import UserError
from sgm.modules.autoencoding.causal_conv import CausalConv3d
from sgm.modules.autoencoding.resize import stretch_time

NUM_GROUPS = 32
EPSILON = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He 2018) with statistics over all frames that it is given.

    Raises:
        UserError: `channels` is not a multiple of the number of groups.
    """
    if channels % NUM_GROUPS:
        raise UserError(
            f"a level of the autoencoder has {channels} channels, but they must be a multiple of "
            f"{NUM_GROUPS}; change ch or ch_mult in encoder_config and decoder_config"
        )
    return nn.GroupNorm(NUM_GROUPS, channels, eps=EPSILON)


class LatentModulatedNorm(nn.Module):
    """GroupNorm whose scale and shift at each place are linear in the latents there.

    The decoder's norm: spatially conditional normalisation of MoVQ (Zheng et al. 2022, section 3.2)
    over video.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """GroupNorm(x) · conv_y(z) + conv_b(z), with z stretched to the size of `x`.

        Args:
            x: (b, c, t, h, w), sizes being multiples of those of `latents` (see `stretch_time`).
            latents: (b, z, t_z, h_z, w_z)

        Returns:
            (b, c, t, h, w), newly allocated.
        """
        num_frames = x.shape[2]
        rows, columns = x.shape[3] // latents.shape[3], x.shape[4] // latents.shape[4]
        # Convolutions of one pixel commute with repeating pixels. They run at the latents' size and
        # only broadcasting brings their result to the size of x, which may be 64 times as large.
        scale, shift = (
            rearrange(stretch_time(conv(latents), num_frames), "b c t h w -> b c t h 1 w 1")
            for conv in (self.conv_y, self.conv_b)
        )
        normed = rearrange(
            self.norm_layer(x), "b c t (h i) (w j) -> b c t h i w j", i=rows, j=columns
        )
        modulated = torch.addcmul(shift, normed, scale)
        return rearrange(modulated, "b c t h i w j -> b c t (h i) (w j)")
