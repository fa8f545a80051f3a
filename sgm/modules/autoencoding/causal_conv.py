"""Causal convolution in time, and its cache of frames between the chunks of a video."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.convolve import convolve, with_room
from sgm.offload import host_copy


class ConvCache:
    """The last input frames of every causal convolution, for the next chunk of the same video.

    A context manager that clears the cache on exit, so that no frame of one video reaches another.
    The frames stay on their device and in the autograd graph.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> ConvCache:
        return self

    def __exit__(self, *failure: object) -> None:
        self._frames.clear()

    def __len__(self) -> int:
        return len(self._frames)

    def recall(self, conv: nn.Module) -> Tensor | None:
        """Return the frames of `conv` from the previous chunk, (b, c, k-1, h, w); None at first."""
        return self._frames.get(conv)

    def fill(self, conv: CausalConv3d, frames: Tensor) -> None:
        """Write the end of the previous chunk before this one, and keep the end of this one.

        Args:
            conv: the convolution whose input the chunk is.
            frames: (b, c, k-1 + t, h, w), the chunk after the k-1 frames that are written.
        """
        fill_room(frames, self.recall(conv), room=conv.room)
        # A copy, because a view of a few frames would keep the whole chunk in memory.
        self._frames[conv] = frames[:, :, -conv.room :].clone()


def fill_room(frames: Tensor, head: Tensor | None, *, room: int) -> None:
    """Write `head`, (b, c, room, h, w), before `frames`; without it repeat their first frame."""
    frames[:, :, :room] = frames[:, :, room : room + 1] if head is None else head


class CausalConv3d(nn.Module):
    """Cubic 3D convolution, stride 1. Output frame i depends only on input frames up to i.

    Time is padded on the left: with the frames of the cache, or at the start of a video with its
    first frame. Space is padded with zeros. The size does not change.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size)

    @property
    def room(self) -> int:
        """Number of frames before a chunk on which its first output frame depends: k - 1."""
        return self.conv.kernel_size[0] - 1

    def forward(self, x: Tensor, *, cache: ConvCache | None = None) -> Tensor:
        """(b, c, t, h, w) → (b, c_out, t, h, w); reads and updates `cache` if there is one."""
        return self.slide(with_room(x, self.room) if self.room else x, cache=cache)

    def slide(
        self,
        frames: Tensor,
        *,
        cache: ConvCache | None = None,
        into: Tensor | None = None,
        add_bias: bool = True,
    ) -> Tensor:
        """As `forward`, for frames with `room` before them, which avoids a copy.

        Args:
            frames: (b, c, k-1 + t, h, w); the first k-1 are overwritten.
            cache: read and updated if there is one.
            into: (b, c_out, t, h, w) for the result; it may be the last t of `frames`.
            add_bias: False leaves the bias to the caller.

        Returns:
            (b, c_out, t, h, w): `into`, or a new tensor.
        """
        room = self.room
        if room and cache is not None:
            cache.fill(self, frames)
        elif room:
            fill_room(frames, None, room=room)
        bias = self.conv.bias if add_bias else None
        return convolve(frames, self.conv.weight, bias=bias, padding=(room + 1) // 2, into=into)


class HostConvCache(ConvCache):
    """A `ConvCache` whose frames are in host memory while they are not used.

    The frames of all convolutions are more than a third of the GPU memory that decoding needs.

    Args:
        device: device of the chunks.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def recall(self, conv: nn.Module) -> Tensor | None:
        """As in `ConvCache`; the frames are copied to the device."""
        frames = super().recall(conv)
        return None if frames is None else frames.to(self._device, non_blocking=True)

    def fill(self, conv: CausalConv3d, frames: Tensor) -> None:
        """As in `ConvCache`.

        Each convolution has one buffer on the host. Only the GPU reads and writes it, in the order
        of its stream, so that the host need not wait for the copies.
        """
        home = self._frames.get(conv)
        super().fill(conv, frames)
        kept = self._frames[conv]
        self._frames[conv] = (
            host_copy(kept) if home is None else home.copy_(kept, non_blocking=True)
        )
