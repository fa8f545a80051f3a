"""Convolution that sees no later frame, and what it remembers between chunks of a video."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn

from sgm.modules.autoencoding.convolve import convolve


class ConvCache:
    """The last input frames of every causal convolution, for the next chunk of the same video.

    A context manager: it starts empty and is empty again when the block is left, so that no frame
    of one video reaches another. The frames stay on their device and in the autograd graph.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, torch.Tensor] = {}

    def __enter__(self) -> ConvCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._frames.clear()

    def __len__(self) -> int:
        return len(self._frames)

    def recall(self, conv: nn.Module) -> torch.Tensor | None:
        """What `conv` carried out of the previous chunk, (b, c, k-1, h, w); None at the first."""
        return self._frames.get(conv)

    def carry(self, conv: nn.Module, frames: torch.Tensor) -> None:
        """Keep `frames`, (b, c, k-1, h, w), for the next call of `conv`."""
        # A copy, because a view of a few frames would hold the whole chunk in memory.
        self._frames[conv] = frames.clone()


class CausalConv3d(nn.Module):
    """Cubic 3D convolution, stride 1, whose output frame i depends on input frames up to i only.

    Time is padded on the left: with the frames of the cache, or by repeating the first frame where
    a video starts. Space is padded with zeros. The size does not change.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size)

    def forward(self, x: torch.Tensor, *, cache: ConvCache | None = None) -> torch.Tensor:
        """(b, c, t, h, w) → (b, c_out, t, h, w); reads and refreshes `cache` where one is given."""
        kernel_size = self.conv.kernel_size[0]
        head = self._head(x, cache) if kernel_size > 1 else None
        return convolve(
            x, self.conv.weight, bias=self.conv.bias, head=head, padding=kernel_size // 2
        )

    def _head(self, x: torch.Tensor, cache: ConvCache | None) -> torch.Tensor:
        length = self.conv.kernel_size[0] - 1
        head = None if cache is None else cache.recall(self)
        if head is None:
            head = x[:, :, :1].expand(-1, -1, length, -1, -1)  # (b, c, k - 1, h, w)
        if cache is not None:
            recent = x if x.shape[2] >= length else torch.cat([head, x], dim=2)
            cache.carry(self, recent[:, :, -length:])
        return head
