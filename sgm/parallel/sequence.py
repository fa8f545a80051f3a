"""One sequence of tokens on several processes, which exchange heads for tokens in attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from sgm.parallel.exchange import exchange


@dataclass(frozen=True)
class SequenceShare:
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
    ) -> SequenceShare:
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
