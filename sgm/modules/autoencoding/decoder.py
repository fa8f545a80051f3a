"""The decoder: latents → video."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from sgm.modules.autoencoding.blocks import (
    UNREAD_PARAMS,
    CausalResnetBlock,
    MiddleBlocks,
    residual_stack,
)
from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache
from sgm.modules.autoencoding.norms import LatentModulatedNorm, norm_silu
from sgm.modules.autoencoding.resize import NUM_TIME_LEVELS, Upsample


class ContextParallelDecoder3D(nn.Module):
    """The causal 3D decoder of CogVideoX (Yang et al. 2024, section 2.1); it mirrors the encoder.

    Args:
        z_channels: channels of the latents.
        out_ch: channels of the video.
        ch: channels of resolution level 0, which runs last.
        ch_mult: factor of `ch` at each resolution level, the same as in the encoder.
        num_res_blocks: number of residual blocks per resolution level of the encoder; the decoder
            has one more per level.
        dropout: dropout rate inside the residual blocks, in training.

    The class keeps this name because configurations use it; no work is split between processes.
    """

    IGNORED_PARAMS = UNREAD_PARAMS | {"in_channels"}  # a parameter of the encoder only

    def __init__(
        self,
        *,
        z_channels: int,
        out_ch: int = 3,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        deepest = len(widths) - 1
        make_norm = partial(LatentModulatedNorm, latent_channels=z_channels)
        make_block = partial(CausalResnetBlock, dropout=dropout, make_norm=make_norm)
        self.z_channels = z_channels
        self.conv_in = CausalConv3d(z_channels, widths[-1], kernel_size=3)
        self.mid = MiddleBlocks(widths[-1], make_block=make_block)
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            blocks = residual_stack(
                widths[min(index + 1, deepest)],
                width,
                num_blocks=num_res_blocks + 1,
                make_block=make_block,
            )
            upsample: nn.Module = nn.Identity()
            if index > 0:
                upsample = Upsample(width, expand_time=index > deepest - NUM_TIME_LEVELS)
            self.up.append(nn.ModuleDict({"block": blocks, "upsample": upsample}))
        self.norm_out = make_norm(widths[0])
        self.conv_out = CausalConv3d(widths[0], out_ch, kernel_size=3)

    def forward(self, z: Tensor, *, cache: ConvCache | None = None) -> Tensor:
        """Decode one chunk of latents; the norms use only the statistics of this chunk.

        Args:
            z: (b, z, t, h, w). If t is odd, the chunk is the start of the video, and its first
                latent frame is decoded to a single frame.
            cache: frames from the previous chunk, updated here; None if `z` is the whole video.

        Returns:
            Frames (b, c, 4t, 8h, 8w), or 4t - 3 frames if t is odd. Values are about in [-1, 1] and
            are not clamped.
        """
        h = self.conv_in(z, cache=cache)
        h = self.mid(h, latents=z, cache=cache)
        for level in reversed(self.up):
            for block in level.block:
                h = block(h, latents=z, cache=cache)
            h = level.upsample(h)
        h = norm_silu(self.norm_out, h, z, room=self.conv_out.room)
        return self.conv_out.slide(h, cache=cache)
