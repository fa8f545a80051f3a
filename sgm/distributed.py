"""The processes of a run: rank, world size, groups, and the exchange of data between them.

PyTorch is imported inside functions, because a process needs its rank before it needs PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, distributed

T = TypeVar("T")

# A process with slow clips may take much longer than the other processes, which wait for it.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Rank:
    """The rank of this process among the processes that torchrun started.

    Without torchrun, the rank is 0 and the world size is 1.

    Attributes:
        index: rank among all processes.
        world_size: number of processes on all hosts.
        local_index: rank among the processes of this host.
    """

    index: int
    world_size: int
    local_index: int

    @classmethod
    def from_environment(cls) -> Rank:
        """Read the environment variables that torchrun sets."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))


def is_main() -> bool:
    """Return whether this process has rank 0, the rank that writes files and logs."""
    from torch import distributed

    return distributed.get_rank() == 0


def data_parallel_rank_and_size() -> tuple[int, int]:
    """Return this process's data-parallel rank and the number of ranks; (0, 1) in one process.

    Every process of the run is a data-parallel rank, because each process holds the whole model.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


class Ranks:
    """All processes of the run, or only this one if PyTorch's processes are not initialised.

    This is a context manager. Every process must enter and leave it, and all must call `gather`
    equally often. torchrun ends all processes when one process exits with an error. A process with
    an error therefore calls `gather` before it exits, to wait for the other processes.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = data_parallel_rank_and_size()
        self._group: distributed.ProcessGroup | None = None

    def __enter__(self) -> Ranks:
        if self.world_size > 1:
            from torch import distributed

            self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._group is not None:
            from torch import distributed

            distributed.destroy_process_group(self._group)
            self._group = None

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of `items`, which must be the same on all processes."""
        return list(items[self.rank :: self.world_size])

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, in rank order. This waits for all processes."""
        if self._group is None:
            return [value]
        from torch import distributed

        values = [value] * self.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values


def exchange(
    sent: Tensor,
    group: distributed.ProcessGroup,
    *,
    sent_sizes: Sequence[int],
    received_sizes: Sequence[int],
) -> Tensor:
    """Send one part of `sent` to each process of `group`, and receive one part from each process.

    Args:
        sent: (sum of `sent_sizes`,), the parts for all processes, concatenated in rank order.
        group: the processes.
        sent_sizes: size of the part for each process.
        received_sizes: size of the part from each process.

    Returns:
        The received parts, concatenated in rank order: (sum of `received_sizes`,).
    """
    from torch import distributed

    received = sent.new_empty(sum(received_sizes))
    # `torch.compile` supports this call, so a block with this call still compiles to one graph.
    distributed.all_to_all_single(
        received, sent, list(received_sizes), list(sent_sizes), group=group
    )
    return received


@dataclass(frozen=True)
class SequenceShard:
    """This process's shard of a sequence: consecutive tokens, and some of the attention heads.

    All layers except the attention process tokens independently; the attention processes heads
    independently. Before the attention, an all-to-all exchange turns a shard of tokens with all
    heads into all tokens with a shard of the heads; after the attention, the exchange is reversed.
    If tokens or heads cannot be divided evenly, the first processes get one more; nothing is
    padded. Source: Jacobs et al., "DeepSpeed Ulysses" (2023), section 3.1.

    Attributes:
        group: the processes that share the sequence.
        rank: rank of this process in the group.
        token_counts: number of tokens of each process, in rank order.
        head_counts: number of heads of each process, in rank order.
    """

    group: distributed.ProcessGroup
    rank: int
    token_counts: tuple[int, ...]
    head_counts: tuple[int, ...]

    @classmethod
    def of(
        cls, group: distributed.ProcessGroup, *, num_tokens: int, num_heads: int
    ) -> SequenceShard:
        """Return the shard of this process, a member of `group`."""
        return cls(
            group=group,
            rank=group.rank(),
            token_counts=_even_counts(num_tokens, group.size()),
            head_counts=_even_counts(num_heads, group.size()),
        )

    def take(self, tokens: Tensor) -> Tensor:
        """Return this process's shard (b, n_own, d) of `tokens` (b, n, d)."""
        return tokens.split(self.token_counts, dim=1)[self.rank]

    def own_text_length(self, text_length: int) -> int:
        """Return how many text tokens this process has; text is the first `text_length` tokens."""
        before = sum(self.token_counts[: self.rank])
        return min(max(text_length - before, 0), self.token_counts[self.rank])

    def gather(self, tokens: Tensor) -> Tensor:
        """Gather the shards `tokens` (b, n_own, d) of all processes; all get (b, n, d)."""
        batch, _, width = tokens.shape
        sent = tokens.transpose(0, 1).repeat(len(self.token_counts), 1, 1)  # one copy per process
        received = exchange(
            sent.flatten(),
            self.group,
            sent_sizes=[tokens.numel()] * len(self.token_counts),
            received_sizes=[count * batch * width for count in self.token_counts],
        )
        return received.view(-1, batch, width).transpose(0, 1)  # (b, n, d)

    def to_heads(self, tokens: Tensor) -> Tensor:
        """Exchange a shard of tokens for a shard of heads, before the attention.

        Args:
            tokens: own tokens with all heads, (b, n_own, heads, size).

        Returns:
            All tokens with own heads, (b, n, own heads, size).
        """
        import torch

        batch, _, _, size = tokens.shape
        # With tokens as the first axis, the concatenated received parts are the whole sequence.
        parts = tokens.transpose(0, 1).split(self.head_counts, dim=2)
        num_heads = self.head_counts[self.rank]
        received = exchange(
            torch.cat([part.flatten() for part in parts]),
            self.group,
            sent_sizes=[part.numel() for part in parts],
            received_sizes=[count * batch * num_heads * size for count in self.token_counts],
        )
        return received.view(-1, batch, num_heads, size).transpose(0, 1)  # (b, n, own heads, size)

    def to_tokens(self, heads: Tensor) -> Tensor:
        """Undo `to_heads`: (b, n, own heads, size) -> (b, n_own, heads, size)."""
        import torch

        batch, _, num_heads, size = heads.shape
        num_own = self.token_counts[self.rank]
        sizes = [num_own * batch * count * size for count in self.head_counts]
        received = exchange(
            heads.transpose(0, 1).flatten(),
            self.group,
            sent_sizes=[count * batch * num_heads * size for count in self.token_counts],
            received_sizes=sizes,
        )
        parts = [
            part.view(num_own, batch, count, size)
            for part, count in zip(received.split(sizes), self.head_counts, strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(0, 1)  # (b, n_own, heads, size)


def _even_counts(total: int, num_parts: int) -> tuple[int, ...]:
    """Divide `total` into `num_parts` counts; the first counts are larger by one if needed."""
    quotient, remainder = divmod(total, num_parts)
    return tuple(quotient + (index < remainder) for index in range(num_parts))
