"""Progress of long work: a bar with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from sgm.distributed import Rank

logger = logging.getLogger(__name__)


_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts steps of work; a context manager, so that the bar is closed after a failure too.

    Args:
        total: number of steps in all; None where the end is not known.
        unit: what a step is called.
        done: steps that were done before, for work that is resumed.
        lines: whether to log lines where there is no terminal; not for work that has its own.
    """

    def __init__(
        self, total: int | None, *, unit: str = "step", done: int = 0, lines: bool = True
    ) -> None:
        self._total = total
        self._unit = unit
        self._done = self._done_before = done
        self._lines = lines
        self._last_line = time.monotonic()
        self._first_step_at: float | None = None
        # Of several ranks, the first one's progress stands for all.
        on_terminal = sys.stderr.isatty() and Rank.from_environment().index == 0
        self._bar = None
        if on_terminal:
            self._bar = tqdm(total=total, unit=unit, initial=done, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def say(self, message: str) -> None:
        """Show a line of text without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            logger.info("%s", message)

    def complain(self, message: str) -> None:
        """Show an error, on any rank, without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            logger.error("%s", message)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar off the terminal while other work shows its own lines or bar."""
        if self._bar is None:
            yield
            return
        self._bar.clear()
        try:
            yield
        finally:
            self._bar.refresh()

    def step(self, description: str) -> None:
        """One more step is done; `description` says of what."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_description(description, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if self._first_step_at is None:
            self._first_step_at = now
        if not self._lines or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = ""
        if self._total is not None:
            left = f" of {self._total}{self._time_left(now)}"
        logger.info("%s: %s %d%s", description, self._unit, self._done, left)

    def _time_left(self, now: float) -> str:
        """By the steps after the first one, which may have compiled or read what all use."""
        measured = self._done - self._done_before - 1
        if not measured:
            return ""
        seconds = (now - self._first_step_at) / measured * (self._total - self._done)
        return f", {seconds:.0f} s left"
