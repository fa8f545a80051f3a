"""Triton kernels for the two passes of `norms.norm_silu`, in half precision and channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

TILE_ELEMENTS = 4096  # number of elements of a feature map that a program holds in registers
MAX_PROGRAMS = 1024  # for the statistics of a sample: the largest GPU runs these in a few waves


@triton.jit
def _tile_places(rows, last_row, channels, NUM_CHANNELS: tl.constexpr):
    """Return the offsets of a tile's elements (rows, channels), and a mask of valid elements."""
    mask = (rows < last_row)[:, None] & (channels < NUM_CHANNELS)[None, :]
    return rows.to(tl.int64)[:, None] * NUM_CHANNELS + channels[None, :], mask


@triton.jit
def _moments_kernel(
    x_ptr,
    means_ptr,
    squares_ptr,
    num_rows,
    sample_stride,
    rows_per_program,
    NUM_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute mean and sum of squared deviations of each channel over this program's rows.

    The first row is subtracted from all rows before they are summed, which avoids cancellation.
    """
    program, sample = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < NUM_CHANNELS
    x_ptr += sample.to(tl.int64) * sample_stride
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    place = first.to(tl.int64) * NUM_CHANNELS + channels
    origin = tl.load(x_ptr + place, mask=is_channel, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        places, mask = _tile_places(rows, last, channels, NUM_CHANNELS)
        values = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        differences = tl.where(mask, values - origin[None, :], 0.0)
        sums += differences
        squares += differences * differences
    total = tl.sum(sums, axis=0)
    mean = total / (last - first)
    square = tl.maximum(tl.sum(squares, axis=0) - total * mean, 0.0)
    place = (program * tl.num_programs(1) + sample) * NUM_CHANNELS + channels
    tl.store(means_ptr + place, origin + mean, mask=is_channel)
    tl.store(squares_ptr + place, square, mask=is_channel)


@triton.jit
def _factors_kernel(
    means_ptr,
    squares_ptr,
    weight_ptr,
    bias_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    num_rows,
    rows_per_program,
    num_parts,
    epsilon,
    NUM_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """Compute scale and shift that normalise one group of channels, from the moments of parts."""
    group, sample = tl.program_id(0), tl.program_id(1)
    parts = tl.arange(0, PARTS)
    within = tl.arange(0, GROUP_SIZE)
    channels = group * GROUP + within
    is_channel = within < GROUP
    mask = (parts < num_parts)[:, None] & is_channel[None, :]
    places = (parts[:, None] * tl.num_programs(1) + sample) * NUM_CHANNELS + channels[None, :]
    counts = tl.minimum(num_rows - parts * rows_per_program, rows_per_program).to(tl.float32)
    means = tl.load(means_ptr + places, mask=mask, other=0.0)
    squares = tl.load(squares_ptr + places, mask=mask, other=0.0)
    offset = tl.zeros([GROUP_SIZE], tl.float32)
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
        means += offset[None, :]
    total = 1.0 * num_rows * GROUP  # `.to()` would fail for 1, which Triton passes as an int
    mean = tl.sum(tl.sum(tl.where(mask, means * (counts / total)[:, None], 0.0), axis=0), axis=0)
    deviations = tl.where(mask, means - mean, 0.0)
    squares += counts[:, None] * deviations * deviations
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) / total
    weight = tl.load(weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    scale = weight / tl.sqrt(variance + epsilon)
    place = sample * NUM_CHANNELS + channels
    tl.store(scale_ptr + place, scale, mask=is_channel)
    tl.store(shift_ptr + place, bias + (offset - mean) * scale, mask=is_channel)


@triton.jit
def _affine_silu_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    latent_scale_ptr,
    latent_shift_ptr,
    into_ptr,
    num_rows,
    x_stride,
    into_stride,
    height,
    width,
    latent_frames,
    latent_height,
    latent_width,
    repeats,
    first_alone,
    NUM_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
):
    """Write SiLU(scale · x + shift) to `into`.

    Before SiLU, the values are modulated by the nearest latent, if there are latents.
    """
    sample = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < NUM_CHANNELS
    places, mask = _tile_places(rows, num_rows, channels, NUM_CHANNELS)
    x = tl.load(x_ptr + sample * x_stride + places, mask=mask, other=0.0).to(tl.float32)
    place = sample * NUM_CHANNELS + channels
    scale = tl.load(scale_ptr + place, mask=is_channel, other=0.0)
    shift = tl.load(shift_ptr + place, mask=is_channel, other=0.0)
    x = x * scale[None, :] + shift[None, :]
    if HAS_LATENTS:
        frame = rows // (height * width)
        y = rows // width % height
        latent = (frame + first_alone * (repeats - 1)) // repeats
        latent = latent * latent_height + y // (height // latent_height)
        latent = latent * latent_width + rows % width // (width // latent_width)
        latent += sample * latent_frames * latent_height * latent_width
        latents = latent.to(tl.int64)[:, None] * NUM_CHANNELS + channels[None, :]
        latent_scale = tl.load(latent_scale_ptr + latents, mask=mask, other=0.0).to(tl.float32)
        latent_shift = tl.load(latent_shift_ptr + latents, mask=mask, other=0.0).to(tl.float32)
        x = x * latent_scale + latent_shift
    x = x / (1.0 + tl.exp(-x))
    result = x.to(into_ptr.dtype.element_ty)
    tl.store(into_ptr + sample * into_stride + places, result, mask=mask)


@triton.jit
def _add_kernel(
    into_ptr,
    x_ptr,
    bias_ptr,
    num_rows,
    into_stride,
    x_stride,
    NUM_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add x + bias to `into`, in place."""
    sample = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < NUM_CHANNELS
    places, mask = _tile_places(rows, num_rows, channels, NUM_CHANNELS)
    into_ptr += sample * into_stride
    x = tl.load(x_ptr + sample * x_stride + places, mask=mask, other=0.0).to(tl.float32)
    own = tl.load(into_ptr + places, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    result = (own + x + bias[None, :]).to(into_ptr.dtype.element_ty)
    tl.store(into_ptr + places, result, mask=mask)


def norm_factors(x: Tensor, layer: nn.GroupNorm, *, offset: Tensor | None) -> Tensor:
    """Return factors a and b, (2, b, c) float32, for which layer(x + offset) is a·x + b.

    Args:
        x: (b, c, t, h, w), half precision.
        layer: the norm.
        offset: (c,), or None for no offset.
    """
    rows, sizes = _as_rows(x), _tile(x.shape[1])
    batch, num_rows, num_channels = rows.shape
    tiles = triton.cdiv(num_rows, sizes["ROWS"])
    rows_per_program = triton.cdiv(tiles, MAX_PROGRAMS) * sizes["ROWS"]
    num_parts = triton.cdiv(num_rows, rows_per_program)
    means = x.new_empty((num_parts, batch, num_channels), dtype=torch.float32)
    squares = torch.empty_like(means)
    factors = means.new_empty(2, batch, num_channels)
    per_group = num_channels // layer.num_groups
    with _on(x):
        _moments_kernel[(num_parts, batch)](
            rows, means, squares, num_rows, rows.stride(0), rows_per_program, **sizes, num_warps=8
        )
        _factors_kernel[(layer.num_groups, batch)](
            means, squares, layer.weight, layer.bias, layer.bias if offset is None else offset,
            *factors, num_rows, rows_per_program, num_parts, layer.eps,
            NUM_CHANNELS=num_channels, GROUP=per_group,
            GROUP_SIZE=triton.next_power_of_2(per_group), PARTS=triton.next_power_of_2(num_parts),
            HAS_OFFSET=offset is not None, num_warps=8,
        )  # fmt: skip
    return factors


def affine_silu(
    x: Tensor, factors: Tensor, *, modulation: tuple[Tensor, Tensor] | None, into: Tensor
) -> None:
    """Normalise `x`, modulate it, apply SiLU and write the result to `into`, all in float32.

    Args:
        x: (b, c, t, h, w), half precision.
        factors: the result of `norm_factors`.
        modulation: scale and shift, (b, c, t_z, h_z, w_z) each, which are repeated to the size of
            `x`; None for no modulation.
        into: (b, c, t, h, w) with channels last; it may be `x`.
    """
    num_frames, height, width = x.shape[2:]
    scale = shift = x
    latent_size: Sequence[int] = (1, 1, 1)
    repeats, first_alone = 1, 0
    if modulation is not None:
        latent_size = modulation[0].shape[2:]
        scale, shift = (factor.permute(0, 2, 3, 4, 1).contiguous() for factor in modulation)
        # As in `stretch_time`, the first frame is not repeated if the number of frames is odd. If
        # there is only one latent frame, it is used for all frames.
        first_alone = num_frames % 2 if latent_size[0] > 1 else 0
        repeats = (num_frames - first_alone) // (latent_size[0] - first_alone)
    sizes = _tile(x.shape[1])
    rows, into_rows = _as_rows(x), _rows_of_result(into)
    grid = (triton.cdiv(rows.shape[1], sizes["ROWS"]), x.shape[0])
    with _on(x):
        _affine_silu_kernel[grid](
            rows, *factors, scale, shift, into_rows, rows.shape[1], rows.stride(0),
            into_rows.stride(0), height, width, *latent_size, repeats, first_alone,
            **sizes, HAS_LATENTS=modulation is not None, num_warps=8,
        )  # fmt: skip


def add_with_bias(into: Tensor, x: Tensor, *, bias: Tensor) -> None:
    """Add ``x + bias`` to `into` in place, with one rounding.

    `into` is (b, c, t, h, w) with channels last, `x` has the same shape, and `bias` is (c,).
    """
    sizes = _tile(x.shape[1])
    rows, into_rows = _as_rows(x), _rows_of_result(into)
    grid = (triton.cdiv(rows.shape[1], sizes["ROWS"]), x.shape[0])
    with _on(x):
        _add_kernel[grid](
            into_rows, rows, bias, rows.shape[1], into_rows.stride(0), rows.stride(0),
            **sizes, num_warps=8,
        )  # fmt: skip


def _as_rows(x: Tensor) -> Tensor:
    """Return `x` (b, c, t, h, w) as rows (b, t·h·w, c) without gaps; a view if channels last."""
    rows = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()


def _rows_of_result(into: Tensor) -> Tensor:
    rows = _as_rows(into)
    assert rows.data_ptr() == into.data_ptr(), "the result must lie with channels last"
    return rows


def _tile(num_channels: int) -> dict[str, int]:
    channels = triton.next_power_of_2(num_channels)
    rows = max(1, TILE_ELEMENTS // channels)
    return {"NUM_CHANNELS": num_channels, "CHANNELS": channels, "ROWS": rows}


def _on(x: Tensor) -> torch.cuda.device:
    """Make the GPU of `x` the current one, because kernels are launched on the current GPU."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
