"""The choice of a clip's frames for an item: settings, counts and times. This decodes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sgm.errors import UserError
from sgm.util import is_finite_number

# Five video frames are two latent frames. A shorter clip shows no motion.
MIN_FRAMES = 5
# A fraction of an output frame's duration. Timestamps are float32; their rounding error is 0.2 ms
# one hour into a clip.
TIME_TOLERANCE = 0.01


class ClipError(Exception):
    """Raised if a clip cannot be used. The message is the reason and calls the clip "it"."""


def no_clip_left(clips: str) -> UserError:
    """Return the error for a set of clips that all fail to decode.

    `clips` describes the set in the message, for example ``3 clips``.
    """
    return UserError(f"none of the {clips} can be decoded; replace their files")


def check_value(name: str, value: object, expected: str, *, valid: bool) -> None:
    """Raise UserError with the message ``NAME: VALUE must EXPECTED`` if `valid` is False."""
    if not valid:
        raise UserError(f"{name}: {value!r} must {expected}")


@dataclass(frozen=True)
class FrameSettings:
    """The settings that determine which frames an item takes from a clip, and the frame size.

    Args:
        video_size: height and width of an item's frames in pixels.
        fps: frames per second of an item.
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
        check_value("max_num_frames", most, "be 4k + 1 (1, 5, 9, …, 49, …)", valid=valid)
        valid = is_finite_number(skip) and skip >= 0 and skip % 1 == 0
        check_value("skip_frms_num", skip, "be a whole number of at least 0", valid=valid)

    @property
    def skip(self) -> int:
        """`skip_frms_num` as an int."""
        return int(self.skip_frms_num)

    def item_length(self, count: int) -> int:
        """Return the number of frames of an item: the largest possible 4k + 1.

        Args:
            count: number of frames that the clip gives at `fps`.

        Raises:
            ClipError: the clip is too short.
        """
        needed = min(MIN_FRAMES, self.max_num_frames)
        if count < needed:
            without = f" after dropping {self.skip} at each end" if self.skip else ""
            raise ClipError(
                f"it is too short: {count} frames at {self.fps:g} fps{without}; {needed} are needed"
            )
        length = min(count, self.max_num_frames)
        return length - (length - 1) % 4


@dataclass(frozen=True)
class ClipFacts:
    """Properties of a clip.

    Attributes:
        frames: number of the clip's own frames, before resampling.
        height: height of a frame in pixels.
        width: width of a frame in pixels.
        rate: the clip's own frames per second.
        count: number of frames that the clip gives at the `fps` of the settings.
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
        """The number of different windows of `length` frames among the `count` frames."""
        return self.count - self.length + 1

    @property
    def seconds(self) -> float:
        """The duration of the clip in seconds."""
        return self.frames / self.rate


def count_at_rate(starts: np.ndarray, fps: float) -> int:
    """Return the number of frames that a clip gives if it is resampled to `fps`.

    Args:
        starts: presentation times of the clip's own frames in seconds, (n,).
        fps: the new number of frames per second.
    """
    if len(starts) == 0:
        return 0
    return math.floor(float(starts[-1] - starts[0]) * fps + TIME_TOLERANCE) + 1


def nearest_frames(starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return, for each of `times` (t,), the index of the frame with the nearest start time, (t,).

    `starts` (n,) are the frames' presentation times. Both arrays are in seconds, ascending.
    """
    return np.searchsorted((starts[1:] + starts[:-1]) / 2, times)


def difference_in_length(lengths: Iterable[int]) -> str:
    """Return a message that items of these lengths cannot share a batch; "" if they can."""
    counts = sorted(Counter(lengths).items())
    if len(counts) < 2:
        return ""
    found = ", ".join(f"{count} with {length} frames" for length, count in counts)
    return f"samples differ in length ({found}), so they cannot share a batch"
