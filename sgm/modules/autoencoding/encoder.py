"""Video → moments of its latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from sgm.modules.autoencoding.blocks import UNREAD_PARAMS, MiddleBlocks, residual_stack
from sgm.modules.autoencoding.causal_conv import CausalConv3d
from sgm.modules.autoencoding.norms import group_norm, norm_silu
from sgm.modules.autoencoding.resize import NUM_TIME_LEVELS, Downsample


class EncoderLevel(nn.Module):
    """Residual blocks at one size, then the step to half of it, except at the last level."""

    def __init__(self, blocks: nn.ModuleList, *, downsample: Downsample | None) -> None:
        super().__init__()
        self.block = blocks
        self.downsample = downsample

    def steps(self) -> Iterator[nn.Module]:
        """What to apply one after the other: (b, c, t, h, w) → (b, c_out, t', h', w') in the end.

        A `forward` would keep its input, as long as all of a clip may be, until its end.
        """
        yield from self.block
        if self.downsample is not None:
            yield self.downsample


class ContextParallelEncoder3D(nn.Module):
    """The causal 3D encoder of CogVideoX (Yang et al. 2024, section 2.1), 8× in space, 4× in time.

    Args:
        ch: channels of the first level.
        ch_mult: factor on `ch` at each level; every level but the last halves the size.
        num_res_blocks: residual blocks a level.
        z_channels: channels of the latents; twice as many come out.
        in_channels: channels of the video.
        dropout: rate inside the residual blocks, in training.

    The name is what configurations call it; the work is not split over processes.
    """

    IGNORED_PARAMS = UNREAD_PARAMS | {"out_ch"}  # which is the decoder's

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
        self.in_channels = in_channels
        self.space_factor = 2**num_resizes
        self.time_factor = 2 ** min(num_resizes, NUM_TIME_LEVELS)
        self.conv_in = CausalConv3d(in_channels, ch, kernel_size=3)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            downsample = None
            if index < num_resizes:
                downsample = Downsample(width, compress_time=index < NUM_TIME_LEVELS)
            blocks = residual_stack(
                widths[index - 1] if index else ch,
                width,
                num_blocks=num_res_blocks,
                dropout=dropout,
                make_norm=group_norm,
            )
            self.down.append(EncoderLevel(blocks, downsample=downsample))
        self.mid = MiddleBlocks(widths[-1], dropout=dropout, make_norm=group_norm)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * z_channels, kernel_size=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode whole clips.

        Args:
            x: (b, c, 4k+1, 8h, 8w) in [-1, 1].

        Returns:
            Moments (b, 2z, k+1, h, w): mean, then log-variance, of the latents.
        """
        h = self.conv_in(x)
        for level in self.down:
            for step in level.steps():
                h = step(h)
        h = self.mid(h)
        h = norm_silu(self.norm_out, h, None, room=self.conv_out.room)
        return self.conv_out.slide(h)
