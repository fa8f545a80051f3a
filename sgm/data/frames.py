"""Which frames of a clip an item has: settings, counts and times. Nothing is decoded here."""

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
# A fraction of an output frame's duration. Timestamps are float32: one hour into a clip their error
# is 0.2 ms.
TIME_TOLERANCE = 0.01


class ClipError(Exception):
    """A clip cannot be used; the message is the reason."""


def no_clip_left(clips: str) -> UserError:
    """The error if no clip can be decoded; `clips` names them, as in ``3 clips``."""
    return UserError(f"none of the {clips} can be decoded; replace their files")


def check_value(name: str, value: object, expected: str, *, valid: bool) -> None:
    """Raise UserError, ``NAME: VALUE must EXPECTED``, unless the value is `valid`."""
    if not valid:
        raise UserError(f"{name}: {value!r} must {expected}")


@dataclass(frozen=True)
class FrameSettings:
    """The settings that decide which frames a clip gives, and their size.

    Args:
        video_size: height and width in pixels.
        fps: frames per second.
        max_num_frames: the largest number of frames of an item; 4k + 1.
        skip_frms_num: number of the clip's own frames that are dropped at each end; a whole number.

    Raises:
        UserError: a value is invalid.
    """

    video_size: Sequence[int]
    fps: float
    max_num_frames: int
    skip_frms_num: float = 3.0

    def __post_init__(self) -> None:
        size, most, skip = self.video_size, self.max_num_frames, self.skip_frms_num
        valid = isinstance(size, Sequence) and len(size) == 2
        valid = valid and all(isinstance(n, int) and n > 0 for n in size)
        check_value("video_size", size, "be [height, width] in pixels", valid=valid)
        valid = is_finite_number(self.fps) and self.fps > 0
        check_value("fps", self.fps, "be a number above 0", valid=valid)
        valid = isinstance(most, int) and most > 0 and most % 4 == 1
        check_value("max_num_frames", most, "be 4k + 1: 1, 5, 9, … 49 …", valid=valid)
        valid = is_finite_number(skip) and skip >= 0 and skip % 1 == 0
        check_value("skip_frms_num", skip, "be a whole number from 0", valid=valid)

    @property
    def skip(self) -> int:
        """`skip_frms_num` as an int."""
        return int(self.skip_frms_num)

    def item_length(self, count: int) -> int:
        """The length of an item from a clip that gives `count` frames at `fps`: the longest 4k + 1.

        Raises:
            ClipError: the clip is too short.
        """
        needed = min(MIN_FRAMES, self.max_num_frames)
        if count < needed:
            without = f" without {self.skip} at each end" if self.skip else ""
            raise ClipError(
                f"it is too short: frames at {self.fps:g} fps{without}: {count}, needed: {needed}"
            )
        length = min(count, self.max_num_frames)
        return length - (length - 1) % 4


@dataclass(frozen=True)
class ClipFacts:
    """Properties of a clip.

    Attributes:
        frames: number of its own frames.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        rate: its own frames per second.
        count: number of frames that it gives at the `fps` of the settings.
        length: number of frames of an item.
    """

    frames: int
    height: int
    width: int
    rate: float
    count: int
    length: int

    @property
    def num_windows(self) -> int:
        """The number of windows of `length` frames."""
        return self.count - self.length + 1

    @property
    def seconds(self) -> float:
        """The duration of the clip."""
        return self.frames / self.rate


def count_at_rate(starts: np.ndarray, fps: float) -> int:
    """The number of frames, 1/fps apart, that a clip gives.

    Args:
        starts: times in seconds at which the clip's own frames appear, (n,).
        fps: frames per second.
    """
    if len(starts) == 0:
        return 0
    return math.floor(float(starts[-1] - starts[0]) * fps + TIME_TOLERANCE) + 1


def nearest_frames(starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """For each of `times` (t,) the index of the frame that appears nearest to it, (t,).

    `starts` (n,) are the times at which frames appear; both are in seconds, ascending.
    """
    return np.searchsorted((starts[1:] + starts[:-1]) / 2, times)


def difference_in_length(lengths: Iterable[int]) -> str:
    """A clause that items of these lengths cannot share a batch; empty if they can."""
    counts = sorted(Counter(lengths).items())
    if len(counts) < 2:
        return ""
    found = ", ".join(f"{count} of {length} frames" for length, count in counts)
    return f"samples differ in length ({found}), so they cannot share a batch"
