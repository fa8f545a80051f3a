"""Decoding of one video by several processes, which decode different chunks at the same time."""

from __future__ import annotations

from torch import Tensor, distributed

from sgm.distributed import exchange
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper, chunks_of
from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache, fill_room


class RelayCache(ConvCache):
    """A cache for the convolutions when, in each round, every process decodes one chunk.

    All processes run the same convolution at the same time. A convolution needs the last frames of
    the previous chunk, and the previous process decodes that chunk. For the first process, the last
    process has decoded it in the previous round.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def fill(self, conv: CausalConv3d, frames: Tensor) -> None:
        """Like `ConvCache.fill`, but the previous chunk is on another process.

        The number t of frames may differ between processes but is at least k-1. The only exception
        is a video of a single frame: there is no next chunk, so its last frames are not used.
        """
        # The axes are in memory order (`convolve.memory_format`); otherwise each pixel would be
        # copied separately.
        last = frames[:, :, -conv.room :].movedim(1, -1)  # (b, k-1, h, w, c)
        rank, size = self.group.rank(), self.group.size()
        sent_sizes, received_sizes = [0] * size, [0] * size
        sent_sizes[(rank + 1) % size] = received_sizes[rank - 1] = last.numel()
        received = exchange(
            last.flatten(), self.group, sent_sizes=sent_sizes, received_sizes=received_sizes
        )
        received = received.view(last.shape).movedim(-1, 1)
        before: Tensor | None = received
        if rank == 0:
            before = self.recall(conv)
            self._frames[conv] = received
        fill_room(frames, before, room=conv.room)


def decode_together(
    first_stage: VideoAutoencoderInferenceWrapper, z: Tensor, *, group: distributed.ProcessGroup
) -> list[Tensor]:
    """Return the decoded chunks on the first process of `group`, and [] on the other processes.

    The chunks are bit-identical to the chunks of `decode_streamed`. Every process of `group` must
    call this with the same latents. The processes decode consecutive chunks at the same time. This
    is possible because a convolution needs only its last input frames from the previous chunk, and
    needs them only when the decoder has reached this convolution.

    Args:
        first_stage: the autoencoder, with the same weights on all processes.
        z: (b, z, t, h, w), t odd.
        group: the processes.
    """
    rank, size = group.rank(), group.size()
    chunks = chunks_of(z)
    decoded: list[Tensor] = []
    with RelayCache(group) as cache:
        for start in range(0, len(chunks), size):
            of_round = chunks[start : start + size]
            # In the last round, processes without a chunk decode the last chunk again, because all
            # processes must take part in the exchanges.
            padded = of_round + of_round[-1:] * (size - len(of_round))
            own = first_stage.decoder(padded[rank], cache=cache)
            # If the number of latent frames is odd, the first latent frame is only one video frame.
            factor = first_stage.encoder.time_factor
            latent_frames = [chunk.shape[2] for chunk in padded]
            num_frames = [factor * n - (factor - 1) * (n % 2) for n in latent_frames]
            decoded += _gather(own, group, num_frames=num_frames)[: len(of_round)]
    return decoded


def _gather(own: Tensor, group: distributed.ProcessGroup, *, num_frames: list[int]) -> list[Tensor]:
    """Return the chunks of all processes on the first process, and [] on the other processes.

    `own` is this process's chunk (b, c, t, h, w); `num_frames` holds the t of each process.
    """
    batch, channels, num_own, height, width = own.shape
    nothing = [0] * (group.size() - 1)
    sizes = [own.numel() // num_own * count for count in num_frames]
    is_first = group.rank() == 0
    received_sizes = sizes if is_first else [0, *nothing]
    received = exchange(
        own.flatten(), group, sent_sizes=[own.numel(), *nothing], received_sizes=received_sizes
    )
    if not is_first:
        return []
    return [
        part.view(batch, channels, count, height, width)
        for part, count in zip(received.split(sizes), num_frames, strict=True)
    ]
