"""Convolution that is causal in time, and a cache of input frames between chunks of a video."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.convolve import convolve, with_room
from sgm.offload import host_copy


class ConvCache:
    """Keeps the last input frames of every causal convolution for the next chunk of a video.

    As a context manager, it clears the cache on exit, so no frame is used for another video. The
    frames stay on their device and in the autograd graph.
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
        """Return the last input frames (b, c, k-1, h, w) of `conv`; None for the first chunk."""
        return self._frames.get(conv)

    def fill(self, conv: CausalConv3d, frames: Tensor) -> None:
        """Write the cached frames into the first k-1 of `frames`, and cache the last k-1 of them.

        The first chunk of a video has no cached frames; its own first frame is repeated instead.

        Args:
            conv: the convolution, of kernel size k, that gets `frames` as its input.
            frames: (b, c, k-1 + t, h, w): k-1 frames to overwrite, and then the chunk.
        """
        fill_room(frames, self.recall(conv), room=conv.room)
        # This is a copy, because a view would keep the whole chunk in memory.
        self._frames[conv] = frames[:, :, -conv.room :].clone()


def fill_room(frames: Tensor, head: Tensor | None, *, room: int) -> None:
    """Write `head` (b, c, room, h, w) into the first `room` of `frames`.

    Without `head`, fill them with copies of the next frame.
    """
    frames[:, :, :room] = frames[:, :, room : room + 1] if head is None else head


class CausalConv3d(nn.Module):
    """A cubic 3D convolution with stride 1; output frame i depends only on input frames up to i.

    Time is padded on the left with the frames of the cache, or at the start of a video with copies
    of the first frame. Space is padded with zeros. The output has the same size as the input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size)

    @property
    def room(self) -> int:
        """The number of frames to pad before a chunk: k - 1 for kernel size k."""
        return self.conv.kernel_size[0] - 1

    def forward(self, x: Tensor, *, cache: ConvCache | None = None) -> Tensor:
        """Convolve `x`, (b, c, t, h, w) → (b, c_out, t, h, w), and update `cache` if given."""
        return self.slide(with_room(x, self.room) if self.room else x, cache=cache)

    def slide(
        self,
        frames: Tensor,
        *,
        cache: ConvCache | None = None,
        into: Tensor | None = None,
        add_bias: bool = True,
    ) -> Tensor:
        """Convolve like `forward`, but without a copy: `frames` already has space for the padding.

        Args:
            frames: (b, c, k-1 + t, h, w); the first k-1 frames are overwritten by the padding.
            cache: read and updated if given.
            into: (b, c_out, t, h, w), receives the result; it may be the last t of `frames`.
            add_bias: if False, the caller adds the bias.

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
    """A `ConvCache` that stores the frames in host memory.

    On the GPU, they would take more than a third of the memory that decoding needs.

    Args:
        device: the device of the chunks.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def recall(self, conv: nn.Module) -> Tensor | None:
        """Return the same as `ConvCache.recall`, copied to the device."""
        frames = super().recall(conv)
        return None if frames is None else frames.to(self._device, non_blocking=True)

    def fill(self, conv: CausalConv3d, frames: Tensor) -> None:
        """Do the same as `ConvCache.fill`, but cache the frames in host memory.

        Each convolution has one buffer on the host. Only the GPU's copies read and write this
        buffer, in the order of the stream, so the host does not wait for them.
        """
        home = self._frames.get(conv)
        super().fill(conv, frames)
        kept = self._frames[conv]
        self._frames[conv] = (
            host_copy(kept) if home is None else home.copy_(kept, non_blocking=True)
        )
