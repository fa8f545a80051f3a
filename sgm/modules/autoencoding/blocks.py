"""The residual blocks of the encoder and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache
from sgm.modules.autoencoding.convolve import empty_frames, frames_per_call
from sgm.modules.autoencoding.norms import Norm, fused_kernels, needs_grad, norm_silu

# Keys that published configurations set but this code ignores; double_z is always true.
UNREAD_PARAMS = frozenset({"double_z", "resolution", "attn_resolutions", "gather_norm"})


class CausalResnetBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each after a norm and SiLU, with a shortcut around both."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float,
        make_norm: Callable[[int], Norm],
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel_size=3)
        self.norm2 = make_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel_size=3)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(
        self, x: Tensor, *, latents: Tensor | None = None, cache: ConvCache | None = None
    ) -> Tensor:
        """Return the output of the block, (b, c_out, t, h, w).

        Args:
            x: the feature map, (b, c, t, h, w).
            latents: (b, z, t_z, h_z, w_z), needed by the decoder's norms; None in the encoder.
            cache: cache of the convolutions if the video is processed in chunks, else None.
        """
        room, channels = self.conv1.room, self.conv1.conv.out_channels
        with_grad = needs_grad(self, x)
        step = x.shape[2] if with_grad else frames_per_call(x, max(x.shape[1], channels))
        fused = None if with_grad else fused_kernels(x)
        # With the fused kernels, the next operation adds the bias of a convolution.
        add_bias = fused is None
        offset = None if add_bias else self.conv1.conv.bias
        h = norm_silu(self.norm1, x, latents, room=room)
        if step >= x.shape[2]:
            h = self.conv1.slide(h, cache=cache, add_bias=add_bias)
            h = norm_silu(self.norm2, h, latents, room=room, offset=offset)
            h = self.conv2.slide(self.dropout(h), cache=cache, add_bias=add_bias)
            self._add_shortcut(h, x, fused=fused)
            return h
        # A long input needs little memory: besides `x`, only one tensor of its size, which all
        # operations except the shortcut change in place, and tensors of `step` frames.
        frames = h
        if channels != x.shape[1]:
            frames = empty_frames(x, channels=channels, size=(room + x.shape[2], *x.shape[3:]))
        h = self.conv1.slide(h, cache=cache, into=frames[:, :, room:], add_bias=add_bias)
        norm_silu(self.norm2, h, latents, into=h, offset=offset)
        F.dropout(h, self.dropout.p, self.training, inplace=True)
        self.conv2.slide(frames, cache=cache, into=h, add_bias=add_bias)
        for start in range(0, x.shape[2], step):
            part = slice(start, start + step)
            self._add_shortcut(h[:, :, part], x[:, :, part], fused=fused)
        return h

    def _add_shortcut(self, h: Tensor, x: Tensor, *, fused: ModuleType | None) -> None:
        """Add the shortcut of `x` to `h` (b, c_out, t, h, w); with `fused`, also conv2's bias."""
        if fused is None:
            h += self.nin_shortcut(x)
            return
        bias = self.conv2.conv.bias
        if isinstance(self.nin_shortcut, nn.Conv3d):
            bias = bias.float() + self.nin_shortcut.bias
            x = F.conv3d(x, self.nin_shortcut.weight)
        fused.add_with_bias(h, x, bias=bias)


# make_block(in_channels, out_channels)
MakeBlock = Callable[[int, int], CausalResnetBlock]


class MiddleBlocks(nn.Module):
    """Two residual blocks at the lowest resolution, without attention between them."""

    def __init__(self, channels: int, *, make_block: MakeBlock) -> None:
        super().__init__()
        self.block_1 = make_block(channels, channels)
        self.block_2 = make_block(channels, channels)

    def forward(self, x: Tensor, **inputs: object) -> Tensor:
        """Return the output, shaped like `x`; for `inputs` see `CausalResnetBlock.forward`."""
        return self.block_2(self.block_1(x, **inputs), **inputs)


def residual_stack(
    in_channels: int, out_channels: int, *, num_blocks: int, make_block: MakeBlock
) -> nn.ModuleList:
    """Return `num_blocks` residual blocks; the first one changes the number of channels."""
    return nn.ModuleList(
        make_block(out_channels if index else in_channels, out_channels)
        for index in range(num_blocks)
    )
