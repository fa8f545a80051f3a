"""The processes of a run: rank, world size, groups, and the exchanges between them.

PyTorch is imported where it is needed, since a process knows its rank before it needs that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, distributed

T = TypeVar("T")

# One process may have slow clips, so that the others wait for it long after they are done.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started; 0 of 1 without it."""

    index: int
    world_size: int
    local_index: int

    @classmethod
    def from_environment(cls) -> Rank:
        """Read torchrun's environment variables."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))


def any_rank(here: bool, group: torch.distributed.ProcessGroup | None) -> bool:
    """Whether something is so on any rank of `group`, if there is one; waits for all of them.

    torchrun ends every process once one exits with an error, so none may while others work.
    """
    if group is None:
        return here
    import torch
    from torch import distributed

    count = torch.tensor(int(here))
    distributed.all_reduce(count, group=group)
    return bool(count)


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    from torch import distributed

    return distributed.get_rank() == 0


def data_parallel_rank_and_size() -> tuple[int, int]:
    """This process among those that see different data, and their number; (0, 1) when alone."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    # Imported here: it loads DeepSpeed, seconds that a single process need not spend.
    from sat import mpu

    # Ranks that share one model by parts see the same data and must draw the same levels.
    if mpu.model_parallel_is_initialized():
        return mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    return distributed.get_rank(), distributed.get_world_size()


class Ranks:
    """All processes of the run, or this one alone where no others were started.

    A context manager: every process enters and leaves it, and calls `gather` equally often.
    """

    def __init__(self) -> None:
        from torch import distributed

        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world_size = distributed.get_world_size() if together else 1
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
        """This process's part of `items`, which all processes have alike."""
        return list(items[self.rank :: self.world_size])

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in the order of ranks; waits for all of them."""
        if self._group is None:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values


def exchange(
    sent: Tensor,
    group: distributed.ProcessGroup,
    *,
    sent_sizes: Sequence[int],
    received_sizes: Sequence[int],
) -> Tensor:
    """Trade consecutive parts of the flat `sent`, one for each process of `group`, with theirs.

    Returns:
        What they sent to this process, in their order, joined: (sum of `received_sizes`,).
    """
    from torch import distributed

    received = sent.new_empty(sum(received_sizes))
    # `torch.compile` knows this call, so that a block with it is one graph.
    distributed.all_to_all_single(
        received, sent, list(received_sizes), list(sent_sizes), group=group
    )
    return received


@dataclass(frozen=True)
class SequenceShard:
    """This process's consecutive tokens of a sequence, and its heads within attention.

    Everything but attention treats tokens one by one. Attention treats heads one by one, so before
    it each process trades its tokens of all heads for all tokens of its heads, and back afterwards.
    Where tokens or heads do not divide evenly, the first processes have one more; nothing is
    padded. Source: Jacobs et al., "DeepSpeed Ulysses" (2023), section 3.1.

    Attributes:
        group: the processes that share the sequence.
        rank: this process's place among them.
        token_counts: tokens of each process, in order.
        head_counts: heads of each process, in order.
    """

    group: distributed.ProcessGroup
    rank: int
    token_counts: tuple[int, ...]
    head_counts: tuple[int, ...]

    @classmethod
    def of(
        cls, group: distributed.ProcessGroup, *, num_tokens: int, num_heads: int
    ) -> SequenceShard:
        """The share of this process, a member of `group`."""
        return cls(
            group=group,
            rank=group.rank(),
            token_counts=_even_counts(num_tokens, group.size()),
            head_counts=_even_counts(num_heads, group.size()),
        )

    def take(self, tokens: Tensor) -> Tensor:
        """This process's part (b, n_own, d) of tokens (b, n, d) that every process has."""
        return tokens.split(self.token_counts, dim=1)[self.rank]

    def own_text_length(self, text_length: int) -> int:
        """How many of its tokens are text, where the first `text_length` of all are."""
        before = sum(self.token_counts[: self.rank])
        return min(max(text_length - before, 0), self.token_counts[self.rank])

    def gather(self, tokens: Tensor) -> Tensor:
        """All tokens (b, n, d), on every process, of its own (b, n_own, d)."""
        batch, num_own, width = tokens.shape
        sent = tokens.transpose(0, 1).repeat(len(self.token_counts), 1, 1)  # a copy for everyone
        received = exchange(
            sent.flatten(),
            self.group,
            sent_sizes=[tokens.numel()] * len(self.token_counts),
            received_sizes=[count * batch * width for count in self.token_counts],
        )
        return received.view(-1, batch, width).transpose(0, 1)  # (b, n, d)

    def to_heads(self, tokens: Tensor) -> Tensor:
        """Own tokens of all heads (b, n_own, heads, size) -> all of own heads (b, n, own, size)."""
        import torch

        batch, _, _, size = tokens.shape
        # Tokens first: then what comes from the others, in their order, is the whole sequence.
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
        """The way back: (b, n, own heads, size) -> (b, n_own, heads, size)."""
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
    """`total` things in `num_parts` parts, the first of which have one more where need be."""
    quotient, remainder = divmod(total, num_parts)
    return tuple(quotient + (index < remainder) for index in range(num_parts))
