"""The chunks of one video decoded on several processes at the same time."""

from __future__ import annotations

from torch import Tensor, distributed

from sgm.distributed import exchange
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper, chunks_of
from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache, fill_room


class RelayCache(ConvCache):
    """What convolutions carry between chunks, where each process decodes one chunk of a round.

    All are in the same convolution at the same time. The chunk before is that of the process
    before; for the first process, that of the last one in the round before.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def fill(self, conv: CausalConv3d, frames: Tensor) -> None:
        """As in one process; t may differ between processes but is at least k-1.

        Shorter is only the single chunk of a single frame, whose end nobody needs.
        """
        # As pixels lie in memory (`layout.memory_format`), or each would be copied on its own.
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
    """The chunks of `decode_streamed`, to the last bit, on the first process; none on the others.

    Every process of `group` calls this with the same latents (b, z, t, h, w), t odd. A chunk needs
    of the one before no more than a convolution's last input frames, when it comes to that
    convolution itself. So the processes decode consecutive chunks side by side.
    """
    rank, size = group.rank(), group.size()
    chunks = chunks_of(z)
    decoded: list[Tensor] = []
    with RelayCache(group) as cache:
        for start in range(0, len(chunks), size):
            of_round = chunks[start : start + size]
            # Past the end a process decodes the last one again: the others count on its exchanges.
            padded = of_round + of_round[-1:] * (size - len(of_round))
            own = first_stage.decoder(padded[rank], cache=cache)
            num_frames = [_num_frames(first_stage, chunk) for chunk in padded]
            decoded += _gather(own, group, num_frames=num_frames)[: len(of_round)]
    return decoded


def _num_frames(first_stage: VideoAutoencoderInferenceWrapper, chunk: Tensor) -> int:
    """Of a decoded chunk: the video's first frame, which is in an odd one, stands alone."""
    factor, num_latent_frames = first_stage.encoder.time_factor, chunk.shape[2]
    return factor * num_latent_frames - (factor - 1) * (num_latent_frames % 2)


def _gather(own: Tensor, group: distributed.ProcessGroup, *, num_frames: list[int]) -> list[Tensor]:
    """On the first process the (b, c, t, h, w) of all, with `num_frames` t; none on the others."""
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
