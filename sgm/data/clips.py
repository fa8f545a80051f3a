"""Reading clips with decord. Runs in a decoding process only: see `sgm.data.decoding`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import decord
import numpy as np

from sgm.data.frames import ClipError, ClipFacts, count_at_rate, nearest_frames

# Frames asked of decord at a time, so that large ones do not fill the memory.
_AT_ONCE = 8
# decord 0.6 cannot hand out frames of these widths: it pads their lines.
_BROKEN_WIDTHS = (8, 12, 16, 24, 48, 72)
_TRIES = 4  # of the first frame; one in a hundred fails where a machine is busy
# Seconds by which a frame that appears at 0 may be early; half a frame at 500 fps.
_ROUNDING = 1e-3


def open_clip(path: str, *, height: int = -1, width: int = -1) -> decord.VideoReader:
    """A reader of the clip that scales its frames, or leaves them as they are.

    Raises:
        ClipError: it is not a video.
    """
    # What the libraries below would print, dozens of lines a file, says less than our one line.
    decord.logging.set_level(decord.logging.QUIET)
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise ClipError("it is empty")
        # One thread: a process is one of many, and the clips of a batch are its parallelism.
        return decord.VideoReader(path, height=height, width=width, num_threads=1)
    except decord.DECORDError as error:
        reason = "it has no video stream" if "video stream" in str(error) else "it is damaged"
        raise ClipError(reason) from None
    except (RuntimeError, AssertionError):  # what decord raises for no container, and for no frame
        raise ClipError("it is not a video, or only part of one") from None
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or "its name is not valid UTF-8"
        raise ClipError(f"it cannot be opened ({reason})") from None


def frame_starts(reader: decord.VideoReader) -> tuple[np.ndarray, bool]:
    """Seconds at which frames appear, float64 (n,), and whether they must be read in order.

    decord finds frames by their timestamps, and fails at that silently in two cases. A clip cut
    without encoding it anew still holds the frames from the last key frame before the cut, at
    times before 0; reading from the file's start leaves them out, but decord counts them. An AVI
    file may hold no timestamps; its rate is constant.

    Raises:
        ClipError: the timestamps cannot be read.
    """
    try:
        spans = reader.get_frame_timestamp(list(range(len(reader))))
    except decord.DECORDError:
        raise ClipError("its timestamps are damaged") from None
    starts = spans.reshape(-1, 2)[:, 0].astype(np.float64)  # (n,)
    if len(starts) < 2 or np.all(np.isfinite(starts)) and starts[0] < starts[-1]:
        hidden = int((starts < -_ROUNDING).sum()) if len(starts) > 1 else 0
        return starts[hidden:], hidden > 0
    rate = reader.get_avg_fps()
    if not 0 < rate < np.inf:
        raise ClipError("its timestamps are damaged")
    return np.arange(len(starts)) / rate, True


def without_ends(starts: np.ndarray, skip: int) -> np.ndarray:
    """`starts` (n,) without `skip` frames at either end."""
    return starts[skip : max(skip, len(starts) - skip)]


def _first_frame(reader: decord.VideoReader, path: str) -> np.ndarray:
    """The first frame (h, w, 3) of a clip just opened; ClipError where it cannot be decoded.

    decord decodes ahead in a thread of its own, and damage that this meets may win over a frame
    that is whole. Which clips a run has must not depend on that, so more than one try is made.
    """
    for attempt in range(_TRIES):
        with suppress(decord.DECORDError, StopIteration):
            return (open_clip(path) if attempt else reader).next().asnumpy()
    raise ClipError("its frames cannot be decoded")


def probe(path: str, *, skip: int, fps: float) -> ClipFacts:
    """What the clip holds and how many frames it gives at `fps`; its first frame is decoded.

    Raises:
        ClipError: it cannot be used.
    """
    reader = open_clip(path)
    starts, _ = frame_starts(reader)
    height, width, _ = _first_frame(reader, path).shape
    span = starts[-1] - starts[0] if len(starts) > 1 else 0.0
    rate = float((len(starts) - 1) / span) if span > 0 else reader.get_avg_fps()
    count = count_at_rate(without_ends(starts, skip), fps)
    return ClipFacts(frames=len(starts), height=height, width=width, rate=rate, count=count)


def covering_size(shape: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Height and width of a frame of `shape`, scaled until it covers `size`."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    height, width = (max(round(scale * of), to) for of, to in zip(shape, size, strict=True))
    return height, width + 2 * (width in _BROKEN_WIDTHS)


def crop(frame: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The centre of a frame (h, w, 3): (height, width, 3)."""
    top, left = ((of - to) // 2 for of, to in zip(frame.shape, size, strict=False))
    return frame[top : top + size[0], left : left + size[1]]


def _found(reader: decord.VideoReader, indices: np.ndarray) -> Iterator[np.ndarray]:
    """The frames at `indices` (t,), ascending, each uint8 (h, w, 3)."""
    for start in range(0, len(indices), _AT_ONCE):
        yield from reader.get_batch(indices[start : start + _AT_ONCE]).asnumpy()


def _in_order(reader: decord.VideoReader, indices: np.ndarray) -> Iterator[np.ndarray]:
    """As `_found`, without ever asking decord to find a frame: it decodes all before them.

    Raises:
        RuntimeError: the clip ends before the last of them; next()'s StopIteration becomes that.
    """
    position = -1
    for index in indices:
        while position < index:
            frame = reader.next()
            position += 1
        yield frame.asnumpy()


def read_window(
    path: str,
    *,
    facts: dict[str, Any],
    skip: int,
    fps: float,
    size: Sequence[int],
    first: int,
    length: int,
) -> np.ndarray:
    """`length` frames 1/fps apart from the `first` on: uint8 (length, height, width, 3).

    They are scaled by decord while it decodes: it decodes ahead, and what waits there at full size
    would take gigabytes.

    Args:
        facts: what `probe` found in the clip.

    Raises:
        ClipError: they cannot be decoded, or the clip is not the one that was probed.
    """
    height, width = covering_size((facts["height"], facts["width"]), size)
    reader = open_clip(path, height=height, width=width)
    all_starts, in_order = frame_starts(reader)
    starts = without_ends(all_starts, skip)
    if len(all_starts) != facts["frames"] or count_at_rate(starts, fps) != facts["count"]:
        raise ClipError("it has changed since the start")
    times = starts[0] + np.arange(first, first + length) / fps
    indices = nearest_frames(starts, times) + skip
    window = np.empty((length, *size, 3), np.uint8)
    try:
        for place, frame in enumerate((_in_order if in_order else _found)(reader, indices)):
            window[place] = crop(frame, size)
    except (decord.DECORDError, RuntimeError):  # RuntimeError: the clip ends early, see _in_order
        raise ClipError("its frames cannot be decoded") from None
    return window
