"""Progress of long work: a bar with the remaining time on a terminal, otherwise log lines."""

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
    """Counts steps of work and shows them. As a context manager, it always closes the bar.

    Args:
        total: number of all steps; None if it is not known.
        unit: the name of a step, such as "frame".
        done: number of steps that an earlier run has already done.
        lines: whether to log lines if there is no terminal; set it to False for work that logs its
            own lines.
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
        self._bar = None
        if sys.stderr.isatty() and Rank.from_environment().index == 0:
            self._bar = tqdm(total=total, unit=unit, initial=done, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def say(self, message: str, *, level: int = logging.INFO) -> None:
        """Print a line above the bar, or log it at `level` if there is no bar.

        Errors are logged on every rank.
        """
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            logger.log(level, "%s", message)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the bar inside a ``with`` block, where other work shows its own lines or bar."""
        if self._bar is None:
            yield
            return
        self._bar.clear()
        try:
            yield
        finally:
            self._bar.refresh()

    def step(self, description: str) -> None:
        """Count one more step, and show the progress.

        Args:
            description: the name of the work, which is shown before the numbers.
        """
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
        """Return the estimated remaining time as text, measured on all steps but the first.

        The first step may take longer, because it compiles code or reads files for all steps.
        """
        measured = self._done - self._done_before - 1
        if not measured:
            return ""
        seconds = (now - self._first_step_at) / measured * (self._total - self._done)
        return f", {seconds:.0f} s left"
