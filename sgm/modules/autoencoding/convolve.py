"""Convolution of long videos within the limits of PyTorch's backends, and its memory format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format in which convolutions of `x` are fastest, by its device and dtype.

    In channels-last format, all channels of a pixel are contiguous. Tensor cores and oneDNN read
    this format directly, and each frame is one block of memory. cuDNN has no such kernels for
    float32.
    """
    if x.is_cuda and x.dtype not in (torch.float16, torch.bfloat16):
        return torch.contiguous_format
    return torch.channels_last_3d


def empty_frames(x: Tensor, *, channels: int, size: tuple[int, int, int]) -> Tensor:
    """Return an uninitialised tensor (b, channels, *size); batch size, device and dtype as `x`."""
    return torch.empty(
        (x.shape[0], channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )


def with_room(x: Tensor, room: int) -> Tensor:
    """Return a copy of `x` (b, c, t, h, w), preceded by `room` frames with arbitrary values."""
    if x.requires_grad:
        return F.pad(x, (0, 0, 0, 0, room, 0))  # (b, c, room + t, h, w)
    frames = empty_frames(x, channels=x.shape[1], size=(room + x.shape[2], *x.shape[3:]))
    frames[:, :, room:] = x
    return frames


# Inputs with more elements are convolved in parts along time, because cuDNN counts elements in 32
# bits; 49 frames of 480 x 720 with 128 channels have too many. The parts are smaller than this
# limit requires, to bound the memory that is needed besides the input and the result.
MAX_ELEMENTS_PER_CALL = 2**30
ELEMENTS_PER_PART = 3 * 2**25  # two frames of 480 x 720 with 128 channels

CPU_ELEMENTS = 2**19  # this many elements fit into a CPU's cache


def frames_per_call(x: Tensor, channels: int) -> int:
    """Return how many frames of `x` (b, c, t, h, w) to convolve per call.

    `channels` is the larger number of channels of the convolution's input and output.
    """
    elements_per_frame = x[:, 0, 0].numel() * channels
    if elements_per_frame * x.shape[2] <= MAX_ELEMENTS_PER_CALL:
        return x.shape[2]
    return max(1, min(MAX_ELEMENTS_PER_CALL, ELEMENTS_PER_PART) // elements_per_frame)


def convolve(
    frames: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    padding: int = 0,
    stride: int = 1,
    into: Tensor | None = None,
) -> Tensor:
    """Return a 3D convolution of `frames` that pads space with zeros and does not pad time.

    Args:
        frames: (b, c, t + k-1, h, w), t at least 1.
        weight: (c_out, c, k, p, q).
        bias: (c_out,).
        padding: number of zeros on each of the four spatial sides.
        stride: stride in space; the stride in time is 1.
        into: (b, c_out, t, h_out, w_out), receives the result; it may be the last t of `frames`.

    Returns:
        (b, c_out, t, h_out, w_out): `into`, or a new tensor.
    """
    overlap = weight.shape[2] - 1
    num_frames = frames.shape[2] - overlap
    step = frames_per_call(frames, max(weight.shape[:2]))
    # The parts go from last to first, because `into` may be the end of `frames`. A part's result
    # then overwrites its own last input frames, which no earlier part needs.
    for stop in range(num_frames, 0, -step):
        start = max(0, stop - step)
        part = _convolve_frames(
            frames[:, :, start : stop + overlap], weight, bias, padding=padding, stride=stride
        )
        if into is None:
            if part.shape[2] == num_frames:
                return part
            into = empty_frames(part, channels=part.shape[1], size=(num_frames, *part.shape[3:]))
        into[:, :, start:stop] = part
        del part  # free its memory before the next part is computed
    assert into is not None, frames.shape
    return into


def _convolve_frames(
    frames: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, stride: int
) -> Tensor:
    """Convolve all frames in one call, (b, c, t + k - 1, h, w) → (b, c_out, t, h_out, w_out)."""
    if frames.device.type != "cpu" or frames.dtype != torch.float32:
        result = F.conv3d(
            frames, weight, bias, stride=(1, stride, stride), padding=(0, padding, padding)
        )
        return result.contiguous(memory_format=memory_format(result))  # no copy of cuDNN's
    samples = [
        _convolve_by_taps(sample, weight, bias, padding=padding, stride=stride) for sample in frames
    ]
    if len(samples) == 1:
        return samples[0][None]
    return torch.stack(samples).contiguous(memory_format=torch.channels_last_3d)


def _convolve_by_taps(
    sample: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, stride: int
) -> Tensor:
    """Convolve one sample, (c, t + k - 1, h, w) → (c_out, t, h_out, w_out), by k 2D convolutions.

    On a CPU in float32, adding up 2D convolutions is up to ten times faster than conv3d, which does
    not use oneDNN if there is padding. The rounding error is smaller too, because each of them adds
    up fewer products. A few frames are computed at a time, so that the input fits into the cache of
    the CPU.
    """
    taps = weight.shape[2]
    rows = sample.transpose(0, 1)  # (t + k - 1, c, h, w)
    num_rows = len(rows) - taps + 1
    step = max(1, CPU_ELEMENTS // rows[0].numel())
    pieces = []
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        # Contiguous, because oneDNN has a larger rounding error in channels-last format.
        planes = rows[start : stop + taps - 1].contiguous()
        piece = F.conv2d(planes[: stop - start], weight[:, :, 0], bias, stride, padding)
        for tap in range(1, taps):
            shifted = planes[tap : tap + stop - start]
            piece.add_(F.conv2d(shifted, weight[:, :, tap], None, stride, padding))
        pieces.append(piece.contiguous(memory_format=torch.channels_last))
    return torch.cat(pieces).transpose(0, 1)
