"""Convolutions over a video within the limits of PyTorch's backends, and their memory layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout in which convolutions are fastest on the device and in the dtype of `x`.

    With channels last, the pixels of a frame are rows of channels. Tensor cores and oneDNN read
    them directly, and frames follow each other without gaps. cuDNN has no such kernels for float32.
    """
    if x.is_cuda and x.dtype not in (torch.float16, torch.bfloat16):
        return torch.contiguous_format
    return torch.channels_last_3d


def empty_frames(x: Tensor, *, channels: int, size: tuple[int, int, int]) -> Tensor:
    """Return an uninitialised (b, channels, t, h, w) of `size` (t, h, w), otherwise as `x`."""
    return torch.empty(
        (x.shape[0], channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )


def with_room(x: Tensor, room: int) -> Tensor:
    """Return a copy of `x`, (b, c, t, h, w), after `room` frames with arbitrary values."""
    if x.requires_grad:
        return F.pad(x, (0, 0, 0, 0, room, 0))  # (b, c, room + t, h, w)
    frames = empty_frames(x, channels=x.shape[1], size=(room + x.shape[2], *x.shape[3:]))
    frames[:, :, room:] = x
    return frames


# Longer inputs are convolved part by part along time. cuDNN counts the elements of a tensor in 32
# bits, which 49 frames of 480 x 720 with 128 channels exceed. The parts are smaller than this limit
# allows, to bound the memory that is needed besides tensors of that size.
MAX_ELEMENTS_PER_CALL = 2**30
ELEMENTS_PER_PART = 3 * 2**25  # two frames of 480 x 720 with 128 channels

CPU_ELEMENTS = 2**19  # elements that fit into the cache of a CPU


def frames_per_call(x: Tensor, channels: int) -> int:
    """Return how many frames of `x`, (b, c, t, h, w), to convolve at once with `channels`."""
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
    """3D convolution that pads space with zeros and does not pad time.

    Args:
        frames: (b, c, t + k-1, h, w), t at least 1.
        weight: (c_out, c, k, p, q).
        bias: (c_out,).
        padding: zeros on each of the four spatial sides.
        stride: stride in space; the stride in time is 1.
        into: (b, c_out, t, h_out, w_out) for the result; it may be the last t of `frames`.

    Returns:
        (b, c_out, t, h_out, w_out): `into`, or a new tensor.
    """
    overlap = weight.shape[2] - 1
    num_frames = frames.shape[2] - overlap
    step = frames_per_call(frames, max(weight.shape[:2]))
    # From the last frames to the first, because a result may overwrite the last of its own input
    # frames, but no input of an earlier result.
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
        del part  # free it before the next one is computed
    assert into is not None, frames.shape
    return into


def _convolve_frames(
    frames: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, stride: int
) -> Tensor:
    """(b, c, t + k - 1, h, w) → (b, c_out, t, h_out, w_out)."""
    if frames.device.type != "cpu" or frames.dtype != torch.float32:
        result = F.conv3d(
            frames, weight, bias, stride=(1, stride, stride), padding=(0, padding, padding)
        )
        return result.contiguous(memory_format=memory_format(result))  # no copy after cuDNN
    samples = [
        _convolve_by_taps(sample, weight, bias, padding=padding, stride=stride) for sample in frames
    ]
    if len(samples) == 1:
        return samples[0][None]
    return torch.stack(samples).contiguous(memory_format=torch.channels_last_3d)


def _convolve_by_taps(
    sample: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, stride: int
) -> Tensor:
    """(c, t + k - 1, h, w) → (c_out, t, h_out, w_out), as a sum of k 2D convolutions.

    On a CPU, in float32, this is up to ten times faster than conv3d, which does not use oneDNN with
    padding. Its shorter sums also have a smaller rounding error. The input of a few frames at a
    time fits into the cache of the CPU.
    """
    taps = weight.shape[2]
    rows = sample.transpose(0, 1)  # (t + k - 1, c, h, w)
    num_rows = len(rows) - taps + 1
    step = max(1, CPU_ELEMENTS // rows[0].numel())
    pieces = []
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        # Contiguous planes: with channels last, oneDNN's sums have a larger rounding error.
        planes = rows[start : stop + taps - 1].contiguous()
        piece = F.conv2d(planes[: stop - start], weight[:, :, 0], bias, stride, padding)
        for tap in range(1, taps):
            shifted = planes[tap : tap + stop - start]
            piece.add_(F.conv2d(shifted, weight[:, :, tap], None, stride, padding))
        pieces.append(piece.contiguous(memory_format=torch.channels_last))
    return torch.cat(pieces).transpose(0, 1)
