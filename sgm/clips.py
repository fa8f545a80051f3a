"""Reading clips with decord: which frames a clip gives at a frame rate, and their pixels."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import decord
import torch
from torch import Tensor
from torch.nn import functional as F

# Of an output frame's duration. Timestamps are float32: an hour into a clip they are off by 0.2 ms.
TIME_TOLERANCE = 0.01
# Frames decoded at full size at a time, so that 4K clips do not fill the memory of a worker.
DECODED_AT_ONCE = 8


class ClipError(Exception):
    """A clip cannot be used; the message is the reason."""


def open_clip(path: Path) -> decord.VideoReader:
    """A reader of the clip; nothing is decoded yet.

    Raises:
        ClipError: it is not a video.
    """
    # What the libraries below would print, dozens of lines a file, says less than our one line.
    decord.logging.set_level(decord.logging.QUIET)
    try:
        if path.stat().st_size == 0:
            raise ClipError("it is empty")
        # One thread: a worker is one of many, and the clips of a batch are its parallelism.
        return decord.VideoReader(str(path), num_threads=1)
    except decord.DECORDError as error:
        reason = "it has no video stream" if "video stream" in str(error) else "it is damaged"
        raise ClipError(reason) from None
    except (RuntimeError, AssertionError):  # what decord raises for no container, and for no frame
        raise ClipError("it is not a video, or only part of one") from None
    except (OSError, UnicodeEncodeError) as error:
        raise ClipError(f"it cannot be opened ({error})") from None


def frame_starts(reader: decord.VideoReader, skip: int) -> Tensor:
    """Seconds at which frames appear, float64 (n,), without `skip` frames at either end.

    Raises:
        ClipError: the timestamps cannot be read.
    """
    try:
        spans = reader.get_frame_timestamp(list(range(len(reader))))
    except decord.DECORDError:
        raise ClipError("its timestamps are damaged") from None
    starts = torch.from_numpy(spans).double().reshape(-1, 2)[:, 0]  # (n,)
    return starts[skip : max(skip, len(starts) - skip)]


def count_at_rate(starts: Tensor, fps: float) -> int:
    """How many frames, 1/fps apart, a clip gives whose frames appear at `starts` (n,)."""
    span = float(starts[-1] - starts[0]) if len(starts) else -math.inf
    return math.floor(span * fps + TIME_TOLERANCE) + 1 if math.isfinite(span) else 0


def probe_clip(path: Path, skip: int, fps: float) -> int:
    """How many frames the clip gives at `fps`; see `open_clip` and `frame_starts` for errors."""
    return count_at_rate(frame_starts(open_clip(path), skip), fps)


def probe_clips(paths: Sequence[Path], *, skip: int, fps: float) -> Iterator[int | ClipError]:
    """For each clip in turn how many frames it gives at `fps`, or why it cannot be used.

    Works in a child process: some damaged headers make the decoder abort the process it runs in.
    """
    # OpenMP's threads do not survive a fork: a child that waits for them would hang.
    new_pool = partial(
        ProcessPoolExecutor,
        max_workers=1,
        mp_context=multiprocessing.get_context("fork"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    pool = new_pool()
    try:
        for path in paths:
            try:
                yield pool.submit(probe_clip, path, skip, fps).result()
            except ClipError as reason:
                yield reason
            except BrokenProcessPool:
                pool = new_pool()
                yield ClipError("it makes the decoder crash")
    finally:
        pool.shutdown()


def nearest_frames(starts: Tensor, times: Tensor) -> Tensor:
    """Index of the frame in `starts` (n,) that appears nearest to each of `times` (t,), seconds."""
    return torch.searchsorted((starts[1:] + starts[:-1]) / 2, times)  # (t,)


def fit_frames(frames: Tensor, size: Sequence[int]) -> Tensor:
    """Scale frames until they cover `size` (height, width), and cut out the centre.

    Args:
        frames: uint8 (t, h, w, 3).

    Returns:
        uint8 (t, 3, height, width).
    """
    planes = frames.permute(0, 3, 1, 2)  # (t, 3, h, w)
    height, width = size
    scale = max(height / planes.shape[2], width / planes.shape[3])
    covering = [round(length * scale) for length in planes.shape[2:]]
    planes = F.interpolate(planes, size=covering, mode="bicubic", antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return planes[:, :, top : top + height, left : left + width]


def read_frames(reader: decord.VideoReader, indices: Tensor, *, size: Sequence[int]) -> Tensor:
    """The frames at `indices` (t,), ascending, fitted to `size`: uint8 (t, 3, height, width).

    Raises:
        ClipError: they cannot be decoded.
    """
    try:
        parts = [
            fit_frames(torch.from_numpy(reader.get_batch(part.numpy()).asnumpy()), size)
            for part in indices.split(DECODED_AT_ONCE)
        ]
    except decord.DECORDError:
        raise ClipError("its frames cannot be decoded") from None
    return torch.cat(parts)
