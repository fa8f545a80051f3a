"""Decoding of one video by several processes, which decode its chunks at the same time."""

from __future__ import annotations

from torch import Tensor, distributed

from sgm.distributed import exchange
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper, chunks_of
from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache, fill_room


class RelayCache(ConvCache):
    """The cache of convolutions if, in each round, every process decodes one chunk.

    All processes run the same convolution at the same time. The previous chunk is that of the
    previous process; for the first process, that of the last process in the previous round.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def fill(self, conv: CausalConv3d, frames: Tensor) -> None:
        """As `ConvCache.fill`; t may differ between processes but is at least k-1.

        A shorter chunk is only the single one of a single frame, and its end is not used.
        """
        # In memory order (`convolve.memory_format`), or else each pixel would be copied alone.
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
    """Return the chunks of `decode_streamed`, bit-identical, on the first process; [] on others.

    Every process of `group` calls this with the same latents. The processes decode consecutive
    chunks at the same time: from the previous chunk, a convolution needs only its last input
    frames, and only when the decoder has come to that convolution.

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
            # Past the end, a process decodes the last chunk again, because all processes must take
            # part in the exchanges.
            padded = of_round + of_round[-1:] * (size - len(of_round))
            own = first_stage.decoder(padded[rank], cache=cache)
            # With an odd number of latent frames, the first one is the video's first frame alone.
            factor = first_stage.encoder.time_factor
            latent_frames = [chunk.shape[2] for chunk in padded]
            num_frames = [factor * n - (factor - 1) * (n % 2) for n in latent_frames]
            decoded += _gather(own, group, num_frames=num_frames)[: len(of_round)]
    return decoded


def _gather(own: Tensor, group: distributed.ProcessGroup, *, num_frames: list[int]) -> list[Tensor]:
    """Return the chunks (b, c, t, h, w) of all processes on the first one; [] on the others.

    `num_frames` holds the t of each process.
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
