"""What convolutions remember between chunks of a video, kept where there is room for it."""

from __future__ import annotations

import torch

from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache
from sgm.offload import host_copy


class HostConvCache(ConvCache):
    """A `ConvCache` whose frames are in the host's memory while they are not used.

    Those of all convolutions together are more than a third of what a GPU needs to decode.

    Args:
        device: of the chunks.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def recall(self, conv: torch.nn.Module) -> torch.Tensor | None:
        """As in `ConvCache`: on the device."""
        frames = super().recall(conv)
        return None if frames is None else frames.to(self._device, non_blocking=True)

    def fill(self, conv: CausalConv3d, frames: torch.Tensor) -> None:
        """As in `ConvCache`.

        A convolution has one place on the host. Only the GPU reads and writes there, in the order
        of its stream, so that nobody waits for the copies.
        """
        home = self._frames.get(conv)
        super().fill(conv, frames)
        kept = self._frames[conv]
        self._frames[conv] = (
            host_copy(kept) if home is None else home.copy_(kept, non_blocking=True)
        )
