"""How feature maps lie in memory, decided in one place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout in which convolutions of `x`'s device and dtype are fastest.

    With channels last a frame's pixels are rows of channels: tensor cores and oneDNN read them as
    they are, and frames follow each other without gaps. cuDNN has no such kernels for float32.
    """
    if x.is_cuda and x.dtype not in (torch.float16, torch.bfloat16):
        return torch.contiguous_format
    return torch.channels_last_3d


def empty_frames(x: Tensor, *, channels: int, size: tuple[int, int, int]) -> Tensor:
    """(b, channels, t, h, w) of `size` (t, h, w), not initialised; the rest is as in `x`."""
    return torch.empty(
        (x.shape[0], channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )


def with_room(x: Tensor, room: int) -> Tensor:
    """A copy of `x`, (b, c, t, h, w), with `room` frames of no meaning in front of it."""
    if x.requires_grad:
        return F.pad(x, (0, 0, 0, 0, room, 0))  # (b, c, room + t, h, w)
    frames = empty_frames(x, channels=x.shape[1], size=(room + x.shape[2], *x.shape[3:]))
    frames[:, :, room:] = x
    return frames
