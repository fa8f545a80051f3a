"""Reading clips with decord, in a process of its own: ``python -m sgm.data.clips PARENT SOCKET``.

`sgm.data.decoding.DecodingProcess` starts this process and sends requests to it. A request is the
name of a function in `_CALLS` and its arguments; the answer is the result or a `ClipError`. The
process does not import torch, so it starts in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

import decord
import numpy as np

from sgm.data.frames import ClipError, ClipFacts, FrameSettings, count_at_rate, nearest_frames

# A damaged header can request frames of any size. With this limit, the process fails before the
# machine runs out of memory. For comparison, eight 8K frames take 0.8 GB.
_MEMORY_BYTES = 4 << 30
_PR_SET_PDEATHSIG = 1  # see prctl(2)
# Number of frames per request to decord; with more, large frames could fill the memory.
_AT_ONCE = 8
# decord 0.6 cannot return frames of these widths, because it pads the lines of such frames.
_BROKEN_WIDTHS = (8, 12, 16, 24, 48, 72)
_TRIES = 4  # attempts to decode the first frame; on a busy machine, one in a hundred fails
# A frame counts as starting before 0 only if it is earlier by more than this many seconds (half a
# frame at 500 fps).
_ROUNDING = 1e-3


def _open(path: str, *, height: int = -1, width: int = -1) -> decord.VideoReader:
    """Open a clip. The returned reader scales frames to `height` and `width`, unless they are -1.

    Raises:
        ClipError: the file is not a video.
    """
    # Otherwise the libraries used by decord print dozens of lines for a damaged file.
    decord.logging.set_level(decord.logging.QUIET)
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise ClipError("it is empty")
        # One thread is enough, because several processes decode the clips of a batch in parallel.
        return decord.VideoReader(path, height=height, width=width, num_threads=1)
    except decord.DECORDError as error:
        reason = "it has no video stream" if "video stream" in str(error) else "it is damaged"
        raise ClipError(reason) from None
    except (RuntimeError, AssertionError):  # decord: not a container format, or no frames
        raise ClipError("it is not a video, or only part of a video file") from None
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or "its name is not valid UTF-8"
        raise ClipError(f"it cannot be opened ({reason})") from None


def _frame_starts(reader: decord.VideoReader) -> tuple[np.ndarray, bool]:
    """Return the start times of the frames, and whether frames must be read in order.

    decord seeks frames by their timestamps. In two cases it silently returns wrong frames:

    - A clip was cut without encoding it again. It still contains the frames between the last key
      frame before the cut and the cut, at times before 0. decord counts these frames, but skips
      them when it reads from the start of the file.
    - An AVI file has no timestamps. Its frame rate is constant.

    Returns:
        The start times in seconds, float64 (n,), and whether one of the two cases was found.

    Raises:
        ClipError: the timestamps cannot be read.
    """
    try:
        spans = reader.get_frame_timestamp(list(range(len(reader))))
    except decord.DECORDError:
        raise ClipError("its timestamps are damaged") from None
    starts = spans.reshape(-1, 2)[:, 0].astype(np.float64)  # (n,)
    if len(starts) < 2:
        return starts, False
    if np.all(np.isfinite(starts)) and starts[0] < starts[-1]:
        hidden = int((starts < -_ROUNDING).sum())
        return starts[hidden:], hidden > 0
    rate = reader.get_avg_fps()
    if not 0 < rate < np.inf:
        raise ClipError("its timestamps are damaged")
    return np.arange(len(starts)) / rate, True


def _without_ends(starts: np.ndarray, skip: int) -> np.ndarray:
    """Return `starts` (n,) without the first `skip` and the last `skip` frames."""
    return starts[skip : max(skip, len(starts) - skip)]


def _first_frame(reader: decord.VideoReader, path: str) -> np.ndarray:
    """Return the first frame (h, w, 3) of a clip that was just opened.

    decord decodes ahead in its own thread. If a later frame is damaged, the request for the first
    frame fails in some attempts only. The choice of clips for a run must not depend on such chance,
    so several attempts are made.

    Raises:
        ClipError: all attempts failed.
    """
    for attempt in range(_TRIES):
        with suppress(decord.DECORDError, StopIteration):
            return (_open(path) if attempt else reader).next().asnumpy()
    raise ClipError("its frames cannot be decoded")


def probe(path: str, settings: FrameSettings) -> ClipFacts:
    """Return the properties of a clip. This decodes its first frame.

    Raises:
        ClipError: the clip is damaged or too short.
    """
    reader = _open(path)
    starts, _ = _frame_starts(reader)
    height, width, _ = _first_frame(reader, path).shape
    span = starts[-1] - starts[0] if len(starts) > 1 else 0.0
    rate = float((len(starts) - 1) / span) if span > 0 else reader.get_avg_fps()
    count = count_at_rate(_without_ends(starts, settings.skip), settings.fps)
    return ClipFacts(len(starts), height, width, rate, count, settings.item_length(count))


def _found(reader: decord.VideoReader, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the frames at the ascending `indices` (t,), each uint8 (h, w, 3)."""
    for start in range(0, len(indices), _AT_ONCE):
        yield from reader.get_batch(indices[start : start + _AT_ONCE]).asnumpy()


def _in_order(reader: decord.VideoReader, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Like `_found`, but decodes every frame up to the last index, so decord does not have to seek.

    Raises:
        RuntimeError: the clip ends too early. Python converts the StopIteration of next() to this.
    """
    position = -1
    for index in indices:
        while position < index:
            frame = reader.next()
            position += 1
        yield frame.asnumpy()


def read_window(path: str, settings: FrameSettings, facts: ClipFacts, first: int) -> np.ndarray:
    """Decode the frames of an item, resampled to `settings.fps`: uint8 (t, height, width, 3).

    decord scales the frames to cover `settings.video_size` while it decodes; the frames are then
    center-cropped. decord must do the scaling, because it decodes ahead: its buffer of frames in
    full size would take gigabytes.

    Args:
        path: the clip.
        settings: the settings that were given to `probe`.
        facts: the result of `probe`.
        first: index of the item's first frame among the clip's frames at `settings.fps`.

    Raises:
        ClipError: the frames cannot be decoded, or the clip has changed since `probe`.
    """
    size, fps = settings.video_size, settings.fps
    scale = max(size[0] / facts.height, size[1] / facts.width)
    height = max(round(scale * facts.height), size[0])
    width = max(round(scale * facts.width), size[1])
    reader = _open(path, height=height, width=width + 2 * (width in _BROKEN_WIDTHS))
    all_starts, in_order = _frame_starts(reader)
    starts = _without_ends(all_starts, settings.skip)
    if len(all_starts) != facts.frames or count_at_rate(starts, fps) != facts.count:
        raise ClipError("it has changed since the start of the run")
    times = starts[0] + np.arange(first, first + facts.length) / fps
    indices = nearest_frames(starts, times) + settings.skip
    window = np.empty((facts.length, *size, 3), np.uint8)
    try:
        for place, frame in enumerate((_in_order if in_order else _found)(reader, indices)):
            top, left = (frame.shape[0] - size[0]) // 2, (frame.shape[1] - size[1]) // 2
            window[place] = frame[top : top + size[0], left : left + size[1]]
    except (decord.DECORDError, RuntimeError):  # RuntimeError: the clip ends early (_in_order)
        raise ClipError("its frames cannot be decoded") from None
    return window


_CALLS = {"probe": probe, "read": read_window}


def main() -> None:
    """Answer requests until the parent closes its end of the socket."""
    parent, socket = map(int, sys.argv[1:])
    # The system kills this process when its parent ends, for whatever reason.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    connection = Connection(socket)
    connection.send("ready")
    with suppress(EOFError):
        while True:
            name, *arguments = connection.recv()
            try:
                connection.send(_CALLS[name](*arguments))
            except ClipError as reason:
                connection.send(reason)


if __name__ == "__main__":
    main()
