"""The encoder: video → mean and log-variance of its latents."""

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
from sgm.modules.autoencoding.causal_conv import CausalConv3d
from sgm.modules.autoencoding.norms import group_norm, norm_silu
from sgm.modules.autoencoding.resize import NUM_TIME_LEVELS, Downsample


class ContextParallelEncoder3D(nn.Module):
    """The causal 3D encoder of CogVideoX (Yang et al. 2024, section 2.1).

    It divides height and width by 8 and time by 4, with the published configuration.

    Args:
        ch: channels of the first resolution level.
        ch_mult: factor of `ch` at each resolution level. Each level except the last halves height
            and width.
        num_res_blocks: number of residual blocks per resolution level.
        z_channels: channels of the latents; the output has twice as many.
        in_channels: channels of the video.
        dropout: dropout rate inside the residual blocks, in training.

    The class keeps this name because configurations use it; no work is split between processes.
    """

    IGNORED_PARAMS = UNREAD_PARAMS | {"out_ch"}  # a parameter of the decoder only

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        num_resizes = len(widths) - 1
        make_block = partial(CausalResnetBlock, dropout=dropout, make_norm=group_norm)
        self.in_channels = in_channels
        self.space_factor = 2**num_resizes
        self.time_factor = 2 ** min(num_resizes, NUM_TIME_LEVELS)
        self.conv_in = CausalConv3d(in_channels, ch, kernel_size=3)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            blocks = residual_stack(
                widths[index - 1] if index else ch,
                width,
                num_blocks=num_res_blocks,
                make_block=make_block,
            )
            downsample: nn.Module = nn.Identity()
            if index < num_resizes:
                downsample = Downsample(width, compress_time=index < NUM_TIME_LEVELS)
            self.down.append(nn.ModuleDict({"block": blocks, "downsample": downsample}))
        self.mid = MiddleBlocks(widths[-1], make_block=make_block)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * z_channels, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        """Encode whole clips.

        Args:
            x: (b, c, 4k+1, 8h, 8w) in [-1, 1].

        Returns:
            Moments of the latents (b, 2z, k+1, h, w): z channels of mean, then z of log-variance.
        """
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            h = level.downsample(h)
        h = self.mid(h)
        h = norm_silu(self.norm_out, h, None, room=self.conv_out.room)
        return self.conv_out.slide(h)
