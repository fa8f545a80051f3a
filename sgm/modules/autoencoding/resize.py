"""Downsampling and upsampling of space and time between the autoencoder's resolution levels."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from sgm.modules.autoencoding.convolve import convolve, empty_frames, frames_per_call

# Time is halved after each of the first two resolution levels, so it is compressed by 4 in total.
NUM_TIME_LEVELS = 2


def stretch_time(x: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Repeat each frame of `x` to get `num_frames` frames (nearest neighbour in time).

    If `num_frames` is odd (4k+1 or 2k+1), `x` starts with the first frame of the video. This frame
    is not repeated; all other frames are.

    Args:
        x: (b, c, t, h, w). If `num_frames` is even, it is a multiple of t; if it is odd,
            `num_frames` - 1 is a multiple of t - 1.
        num_frames: number of frames of the result.

    Returns:
        (b, c, num_frames, h, w)
    """
    if x.shape[2] == num_frames:
        return x
    first_alone = num_frames % 2
    repeats, remainder = divmod(num_frames - first_alone, x.shape[2] - first_alone)
    assert remainder == 0, f"{x.shape[2]} frames cannot be repeated to {num_frames}"
    position = torch.arange(num_frames, device=x.device) + first_alone * (repeats - 1)
    return x.index_select(2, position // repeats)  # (b, c, num_frames, h, w)


class Downsample(nn.Module):
    """Halves space by a strided convolution, and optionally time by averaging pairs of frames."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Downsample `x`, (b, c, t, h, w) → (b, c, ⌈t/2⌉ or t, ⌊h/2⌋, ⌊w/2⌋)."""
        # Each part has an even number of frames, but if the total is odd, the first part has one
        # frame more: the first frame of the video, which is not averaged.
        step = frames_per_call(x, x.shape[1]) // 2 * 2 or 2
        num_frames = x.shape[2]
        bounds = [0, *range(step + num_frames % 2, num_frames, step), num_frames]
        parts = [self._halve(x[:, :, start:stop]) for start, stop in pairwise(bounds)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _halve(self, x: torch.Tensor) -> torch.Tensor:
        if self.compress_time:
            x = _average_pairs(x)
        x = F.pad(x, (0, 1, 0, 1))  # (b, c, t, h + 1, w + 1), right and bottom
        return convolve(x, self.conv.weight.unsqueeze(2), bias=self.conv.bias, stride=2)


class Upsample(nn.Module):
    """Doubles space, and optionally time, by repeating; a convolution then smooths space."""

    def __init__(self, channels: int, *, expand_time: bool) -> None:
        super().__init__()
        self.expand_time = expand_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Upsample `x`, (b, c, t, h, w) → (b, c, 2t or t, 2h, 2w); an odd t becomes 2t - 1."""
        x = _double_pixels(x)  # (b, c, t, 2h, 2w)
        x = convolve(x, self.conv.weight.unsqueeze(2), bias=self.conv.bias, padding=1)
        # The convolution treats frames independently. Repeating frames after it gives the same
        # result for half of the work.
        return _double_frames(x) if self.expand_time else x


def _double_pixels(x: torch.Tensor) -> torch.Tensor:
    """Repeat pixels, (b, c, t, h, w) → (b, c, t, 2h, 2w), nearest neighbour.

    This keeps the memory format, which F.interpolate would change for 3D inputs.
    """
    num_frames, height, width = x.shape[2:]
    result = empty_frames(x, channels=x.shape[1], size=(num_frames, 2 * height, 2 * width))
    quads = result.unflatten(4, (width, 2)).unflatten(3, (height, 2))  # (b, c, t, h, 2, w, 2)
    quads.copy_(x[:, :, :, :, None, :, None])
    return result


def _double_frames(x: torch.Tensor) -> torch.Tensor:
    """Repeat frames like `stretch_time`, to 2t frames, or 2t - 1 if t is odd; keep the format."""
    num_frames = x.shape[2]
    first_alone = num_frames % 2
    result = empty_frames(x, channels=x.shape[1], size=(2 * num_frames - first_alone, *x.shape[3:]))
    result[:, :, :first_alone] = x[:, :, :first_alone]
    pairs = result[:, :, first_alone:].unflatten(2, (num_frames - first_alone, 2))
    pairs.copy_(x[:, :, first_alone:, None])  # (b, c, t - 1 or t, 2, h, w)
    return result


def _average_pairs(x: torch.Tensor) -> torch.Tensor:
    """Average each pair of frames; if the number of frames is odd, keep the first unchanged."""
    first_alone = x.shape[2] % 2
    even, odd = x[:, :, first_alone::2], x[:, :, first_alone + 1 :: 2]  # (b, c, ⌊t/2⌋, h, w)
    # Halving before adding avoids an overflow in float16. mean() would be five times slower.
    means = torch.add(0.5 * even, odd, alpha=0.5)
    return torch.cat([x[:, :, :first_alone], means], dim=2)  # (b, c, ⌈t/2⌉, h, w)
