"""Which frames of a clip an item holds: settings, counts and times, without decoding anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sgm.errors import UserError
from sgm.util import is_finite_number

# Two latent frames: a shorter clip shows no motion.
MIN_FRAMES = 5
# Of an output frame's duration. Timestamps are float32: an hour into a clip they are off by 0.2 ms.
TIME_TOLERANCE = 0.01


class ClipError(Exception):
    """A clip cannot be used; the message is the reason."""


@dataclass(frozen=True)
class FrameSettings:
    """What decides which frames a clip gives, and their size.

    Args:
        video_size: height and width in pixels.
        fps: frames per second.
        max_num_frames: frames of an item at most; 4k + 1.
        skip: frames of the clip's own that are dropped at each end.
    """

    video_size: tuple[int, int]
    fps: float
    max_num_frames: int
    skip: int

    @classmethod
    def checked(
        cls,
        video_size: Sequence[int],
        *,
        fps: float,
        max_num_frames: int,
        skip_frms_num: float,
    ) -> FrameSettings:
        """Settings from the values of a configuration.

        Raises:
            UserError: one of them is wrong.
        """
        size = list(video_size) if isinstance(video_size, Sequence) else []
        if len(size) != 2 or not all(isinstance(pixels, int) and pixels > 0 for pixels in size):
            raise UserError(f"video_size: {video_size!r} must be [height, width] in pixels")
        if not is_finite_number(fps) or fps <= 0:
            raise UserError(f"fps: {fps!r} must be a number above 0")
        if not isinstance(max_num_frames, int) or max_num_frames < 1 or max_num_frames % 4 != 1:
            raise UserError(f"max_num_frames: {max_num_frames!r} must be 4k + 1: 1, 5, 9, … 49 …")
        if not is_finite_number(skip_frms_num) or skip_frms_num < 0 or skip_frms_num % 1:
            raise UserError(f"skip_frms_num: {skip_frms_num!r} must be a whole number from 0")
        return cls(tuple(size), fps, max_num_frames, int(skip_frms_num))

    def item_length(self, count: int) -> int:
        """Frames of an item from a clip that gives `count` frames at `fps`: the longest 4k + 1.

        Raises:
            ClipError: it is too short.
        """
        needed = min(MIN_FRAMES, self.max_num_frames)
        if count < needed:
            without = f" without {self.skip} at each end" if self.skip else ""
            raise ClipError(
                f"it is too short: frames at {self.fps:g} fps{without}: {count}, needed: {needed}"
            )
        length = min(count, self.max_num_frames)
        return length - (length - 1) % 4

    def num_windows(self, count: int) -> int:
        """At how many places an item may begin in a clip that gives `count` frames at `fps`."""
        return count - self.item_length(count) + 1


@dataclass(frozen=True)
class ClipFacts:
    """What looking at a clip tells: its own frames, their size and rate, and `count` at `fps`."""

    frames: int
    height: int
    width: int
    rate: float
    count: int

    @property
    def seconds(self) -> float:
        """How long the clip lasts."""
        return self.frames / self.rate


def count_at_rate(starts: np.ndarray, fps: float) -> int:
    """How many frames, 1/fps apart, a clip gives whose frames appear at `starts` (n,), seconds."""
    return (
        math.floor(float(starts[-1] - starts[0]) * fps + TIME_TOLERANCE) + 1 if len(starts) else 0
    )


def nearest_frames(starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the frame in `starts` (n,) that appears nearest to each of `times` (t,), seconds."""
    return np.searchsorted((starts[1:] + starts[:-1]) / 2, times)  # (t,)


def difference_in_length(lengths: Iterable[int]) -> str:
    """In a sentence, that items of these lengths cannot share a batch; empty where they can."""
    counts = sorted(Counter(lengths).items())
    if len(counts) < 2:
        return ""
    found = ", ".join(f"{count} of {length} frames" for length, count in counts)
    return f"samples differ in length ({found}), so they cannot share a batch"
