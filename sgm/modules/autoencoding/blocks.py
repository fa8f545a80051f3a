"""Residual blocks of encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache
from sgm.modules.autoencoding.convolve import empty_frames, frames_per_call
from sgm.modules.autoencoding.norms import fused_kernels, needs_grad, norm_silu

MakeNorm = Callable[[int], nn.Module]


# Keys of published configurations that have no effect; double_z is always true.
UNREAD_PARAMS = frozenset({"double_z", "resolution", "attn_resolutions", "gather_norm"})


class CausalResnetBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each after norm and SiLU, and a shortcut around them."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dropout: float, make_norm: MakeNorm
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel_size=3)
        self.norm2 = make_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel_size=3)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        *,
        latents: torch.Tensor | None = None,
        cache: ConvCache | None = None,
    ) -> torch.Tensor:
        """(b, c, t, h, w) → (b, c_out, t, h, w).

        Args:
            x: the feature map.
            latents: (b, z, t_z, h_z, w_z) for the decoder's norms.
            cache: cache of the convolutions, if a video is processed in chunks.
        """
        step = frames_per_call(x, max(x.shape[1], self.conv1.conv.out_channels))
        with_grad = needs_grad(self, x)
        fused = None if with_grad else fused_kernels(x)
        if step < x.shape[2] and not with_grad:
            return self._in_place(x, latents=latents, cache=cache, step=step, fused=fused)
        # With the fused kernels, the bias of a convolution is left to the next operation.
        add_bias = fused is None
        h = norm_silu(self.norm1, x, latents, room=self.conv1.room)
        h = self.conv1.slide(h, cache=cache, add_bias=add_bias)
        h = norm_silu(self.norm2, h, latents, room=self.conv2.room, offset=self._offset(fused))
        h = self.conv2.slide(self.dropout(h), cache=cache, add_bias=add_bias)
        self._add_shortcut(h, x, fused=fused)
        return h

    def _in_place(
        self,
        x: torch.Tensor,
        *,
        latents: torch.Tensor | None,
        cache: ConvCache | None,
        step: int,
        fused: ModuleType | None,
    ) -> torch.Tensor:
        """The same for long inputs, with little memory: besides `x` one tensor of its size, which
        all operations but the shortcut change in place, and `step` frames.
        """
        room, size = self.conv1.room, (self.conv1.room + x.shape[2], *x.shape[3:])
        add_bias = fused is None
        frames = norm_silu(self.norm1, x, latents, room=room)
        target = frames
        if self.conv1.conv.out_channels != x.shape[1]:
            target = empty_frames(x, channels=self.conv1.conv.out_channels, size=size)
        inside = target[:, :, room:]
        h = self.conv1.slide(frames, cache=cache, into=inside, add_bias=add_bias)
        del frames
        norm_silu(self.norm2, h, latents, into=h, offset=self._offset(fused))
        F.dropout(h, self.dropout.p, self.training, inplace=True)
        self.conv2.slide(target, cache=cache, into=h, add_bias=add_bias)
        for part in (slice(start, start + step) for start in range(0, x.shape[2], step)):
            self._add_shortcut(h[:, :, part], x[:, :, part], fused=fused)
        return h

    def _offset(self, fused: ModuleType | None) -> torch.Tensor | None:
        """Return the bias that the first convolution leaves to the norm after it."""
        return None if fused is None else self.conv1.conv.bias

    def _add_shortcut(self, h: torch.Tensor, x: torch.Tensor, *, fused: ModuleType | None) -> None:
        """Add the shortcut of x to h, (b, c_out, t, h, w); with `fused` also the missing bias."""
        if fused is None:
            h += self.nin_shortcut(x)
            return
        bias = self.conv2.conv.bias
        if isinstance(self.nin_shortcut, nn.Conv3d):
            bias = bias.float() + self.nin_shortcut.bias
            x = F.conv3d(x, self.nin_shortcut.weight)
        fused.add_with_bias(h, x, bias=bias)


class MiddleBlocks(nn.Module):
    """Two residual blocks at the lowest resolution, without attention between them."""

    def __init__(self, channels: int, *, dropout: float, make_norm: MakeNorm) -> None:
        super().__init__()
        self.block_1 = CausalResnetBlock(channels, channels, dropout=dropout, make_norm=make_norm)
        self.block_2 = CausalResnetBlock(channels, channels, dropout=dropout, make_norm=make_norm)

    def forward(self, x: torch.Tensor, **inputs: object) -> torch.Tensor:
        """(b, c, t, h, w) → the same shape; `inputs` as in `CausalResnetBlock.forward`."""
        return self.block_2(self.block_1(x, **inputs), **inputs)


def residual_stack(
    in_channels: int, out_channels: int, *, num_blocks: int, dropout: float, make_norm: MakeNorm
) -> nn.ModuleList:
    """Return `num_blocks` residual blocks; the first one changes the number of channels."""
    return nn.ModuleList(
        CausalResnetBlock(
            out_channels if index else in_channels,
            out_channels,
            dropout=dropout,
            make_norm=make_norm,
        )
        for index in range(num_blocks)
    )
