"""The lines of a log during long work, without a terminal."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from sgm import progress as progress_module
from sgm.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock; tests set `now`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    return clock


@pytest.mark.parametrize("done", [0, 5])
def test_the_time_left_is_by_the_steps_after_the_first(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture, done: int
) -> None:
    caplog.set_level(logging.INFO)
    with Progress(done + 10, done=done) as progress:
        for clock.now in (30.0, 31.0, 38.0, 42.0):  # the first one compiles; 4 s a step after it
            progress.step("a video")
    steps = [(done + 1, ""), (done + 4, ", 24 s left")]
    said = [f"a video: step {step} of {done + 10}{left}" for step, left in steps]
    assert caplog.messages == said


def test_work_without_an_end_has_no_time_left(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Progress(None, unit="prompt") as progress:
        for clock.now in (11.0, 22.0):
            progress.step("typed")
    assert caplog.messages == ["typed: prompt 1", "typed: prompt 2"]
