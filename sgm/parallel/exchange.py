"""The one exchange between processes that all sharing of tensors is made of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, distributed


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
    received = sent.new_empty(sum(received_sizes))
    # `torch.compile` knows this call, so that a block with it is one graph.
    distributed.all_to_all_single(
        received, sent, list(received_sizes), list(sent_sizes), group=group
    )
    return received
