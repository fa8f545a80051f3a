"""The processes that prepare data together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")

# One process may have slow clips, so that the others wait for it long after they are done.
_PATIENCE = timedelta(days=7)


class Ranks:
    """All processes of the run, or this one alone where no others were started.

    A context manager: every process enters and leaves it, and calls `gather` equally often.
    """

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world_size = distributed.get_world_size() if together else 1
        self._group: distributed.ProcessGroup | None = None

    def __enter__(self) -> Ranks:
        if self.world_size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of `items`, which all processes have alike."""
        return list(items[self.rank :: self.world_size])

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in the order of ranks; waits for all of them."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values
