"""Attention for Hopper GPUs, faster than FlashAttention because it skips most of the row maximum.

A softmax subtracts the maximum of a row of scores only to keep the exponentials in the range of the
dtype, so any value near the maximum works too. This kernel subtracts the maximum over only two
blocks of keys: the last block and, in self-attention, the block at the positions of the queries.
It computes no maximum over the other blocks and never rescales sums. If the subtracted value is too
low, numbers overflow and the result is not finite. A second kernel, the fallback, then computes
these results again with the true maximum, ROWS queries at a time.

The structure is that of FlashAttention-3 (Shah et al., 2024, section 3): one warp loads blocks of
keys and values, and three groups of warps take turns in using the tensor cores. Each group computes
the scores of a block while it adds up the values of the previous block.

The kernel is written in Gluon, the language in Triton that controls single warps. Warps synchronize
by barriers, which count arrivals or received bytes and go through phases 0, 1, 0 and so on:
`wait(barrier, phase)` waits until that phase is complete. A new barrier is in phase 0, and its
phase 1 counts as complete. Rows are the tokens of all samples; columns are the channels of all
heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEAD_SIZE = gl.constexpr(64)
ROWS = gl.constexpr(64)  # queries per group of four warps, fixed by the tensor core instruction
GROUPS = gl.constexpr(3)  # `_fast_kernel` and its register counts only work for 3 groups
KEYS = gl.constexpr(128)  # keys per block
# Shared memory holds this many blocks of keys and as many blocks of values. The first blocks of
# keys in it are the two at the positions of the queries.
STAGES = gl.constexpr(2)
REGISTERS = gl.constexpr(160)  # per thread of the second and third group; the first gets the rest
LOADING_REGISTERS = gl.constexpr(24)
# A score equal to the maximum over the two blocks gets the weight 2 ** -ROOM. Because the largest
# float16 is 65504, scores may then exceed that maximum by up to (16 + ROOM) ln 2 = 14.5. If no
# score exceeds it, the smallest normal float16, 2 ** -14, is 2 ** -9 of the largest weight, and
# smaller weights have a rounding error of at most 2 ** -20 of the largest weight.
ROOM = gl.constexpr(5)
LN_2 = gl.constexpr(math.log(2))
_SCALE = HEAD_SIZE.value**-0.5 / math.log(2)  # converts query times key to an exponent of 2
CAREFUL_PROGRAMS = 512  # programs of the fallback: slightly more than a GPU runs at once
CAREFUL_PARTS = gl.constexpr(64)  # largest number of parts that a fallback program checks

# How threads hold the scores, the result, and the weights that are multiplied by the values.
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS.value, 16]))
_RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE.value, 16]))
_RESULT_ROWS = gl.constexpr(gl.SliceLayout(1, _RESULT.value))
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=_RESULT.value, k_width=2))
_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

# Triton renamed this function after version 3.7.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _load_blocks(tiles, shared, barriers, place):
    """Load queries, the two blocks of keys at their positions, then all blocks from last to first.

    A block of keys or values is loaded when all groups have finished using the block it replaces.
    """
    query_tiles, key_tiles, value_tiles = tiles
    queries, keys, values = shared
    query_ready, key_ready, value_ready, key_free, value_free, _ = barriers
    tile, query_row, key_row, column, num_blocks = place
    mbarrier.expect(query_ready, GROUPS * ROWS * HEAD_SIZE * 2)
    for group in gl.static_range(GROUPS):
        row = query_row + group * ROWS
        _load_tile(query_tiles, [row, column], query_ready, queries.index(group))
    for near in gl.static_range(STAGES):
        # The last block may be incomplete, so it is not loaded here but only below.
        beside = gl.minimum(tile * GROUPS * ROWS // KEYS + near, gl.maximum(num_blocks - 2, 0))
        row = key_row + beside * KEYS
        mbarrier.expect(key_ready.index(near), KEYS * HEAD_SIZE * 2)
        _load_tile(key_tiles, [row, column], key_ready.index(near), keys.index(near))
    for i in range(num_blocks):
        stage, turn = i % STAGES, (i // STAGES) & 1
        row = key_row + (num_blocks - 1 - i) * KEYS
        mbarrier.wait(key_free.index(stage), turn)
        mbarrier.expect(key_ready.index(stage), KEYS * HEAD_SIZE * 2)
        _load_tile(key_tiles, [row, column], key_ready.index(stage), keys.index(stage))
        mbarrier.wait(value_free.index(stage), turn ^ 1)
        mbarrier.expect(value_ready.index(stage), KEYS * HEAD_SIZE * 2)
        _load_tile(value_tiles, [row, column], value_ready.index(stage), values.index(stage))


@gluon.jit
def _sums(exponentials):
    """Return sums over the keys of a block, (ROWS, 8); each sum uses the values of one thread."""
    return gl.sum(gl.reshape(exponentials, (ROWS, KEYS // 8, 8)), axis=1)


@gluon.jit
def _scores(query, keys):
    """Return the scores (ROWS, KEYS) of a block, unscaled."""
    nothing = gl.zeros((ROWS, KEYS), gl.float32, _SCORES)
    scores = warpgroup_mma(query, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, [scores])


@gluon.jit
def _attend_group(outputs, shared, barriers, place, sizes, scale, group: gl.constexpr):
    """Compute the attention of one group's queries to all keys."""
    result_ptr, sum_ptr, broken_ptr = outputs
    queries, keys, values = shared
    query_ready, key_ready, value_ready, key_free, value_free, turns = barriers
    tile, query_row, _, column, num_blocks = place
    num_queries, num_keys, width = sizes
    query = queries.index(group)

    # Compute the maximum over the block at the queries' positions (phase 0 of the key barriers) and
    # over the last block.
    mbarrier.wait(query_ready, 0)
    for near in gl.static_range(STAGES):
        mbarrier.wait(key_ready.index(near), 0)
    own = (tile * GROUPS + group) * ROWS // KEYS - tile * GROUPS * ROWS // KEYS
    maximum = gl.max(_scores(query, keys.index(own)), 1)
    maximum = gl.where(num_blocks > 1, maximum, float("-inf"))
    for near in gl.static_range(STAGES):
        mbarrier.arrive(key_free.index(near))
    mbarrier.wait(key_ready.index(0), 1)
    scores = _scores(query, keys.index(0))
    mbarrier.arrive(key_free.index(0))
    key = (num_blocks - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, _SCORES))
    scores = gl.where((key < num_keys)[None, :], scores, float("-inf"))
    shift = gl.maximum(maximum, gl.max(scores, 1)) * scale + ROOM

    exponentials = gl.exp2(scores * scale - shift[:, None])
    sums = _sums(exponentials)
    weights = gl.convert_layout(exponentials.to(keys.dtype), _WEIGHTS)
    result = gl.zeros((ROWS, HEAD_SIZE), gl.float32, _RESULT)
    nothing = gl.zeros((ROWS, KEYS), gl.float32, _SCORES)
    for i in range(1, num_blocks):
        # Compute the scores of this block while the values of the previous block are added up.
        stage, last = i % STAGES, (i - 1) % STAGES
        mbarrier.wait(key_ready.index(stage), (i // STAGES + 1) & 1)
        mbarrier.wait(turns.index(group), (i - 1) & 1)
        transposed = keys.index(stage).permute((1, 0))
        scores = warpgroup_mma(query, transposed, nothing, use_acc=False, is_async=True)
        mbarrier.wait(value_ready.index(last), ((i - 1) // STAGES) & 1)
        result = warpgroup_mma(weights, values.index(last), result, is_async=True)
        mbarrier.arrive(turns.index((group + 1) % GROUPS))
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(key_free.index(stage))
        exponentials = gl.exp2(scores * scale - shift[:, None])
        sums += _sums(exponentials)
        # The exponentials are listed too; otherwise the compiler computes them after the product.
        result, exponentials = warpgroup_mma_wait(0, [result, exponentials])
        mbarrier.arrive(value_free.index(last))
        weights = gl.convert_layout(exponentials.to(keys.dtype), _WEIGHTS)
    last = (num_blocks - 1) % STAGES
    mbarrier.wait(value_ready.index(last), ((num_blocks - 1) // STAGES) & 1)
    result = warpgroup_mma(weights, values.index(last), result, is_async=True)
    result = warpgroup_mma_wait(0, [result])

    total = gl.convert_layout(gl.sum(sums, 1), _RESULT_ROWS)
    shift = gl.convert_layout(shift, _RESULT_ROWS)
    row = (tile * GROUPS + group) * ROWS + gl.arange(0, ROWS, _RESULT_ROWS)
    is_row = row < num_queries
    # x - x is not 0 if x is not finite.
    is_broken = (result - result != 0.0) | (total - total != 0.0)[:, None]
    num_broken = gl.sum(gl.sum((is_broken & is_row[:, None]).to(gl.int32), 1), 0)
    head = gl.program_id(1).to(gl.int64)
    gl.store(broken_ptr + (head * gl.num_programs(0) + tile) * GROUPS + group, num_broken)
    head_column = column + gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, _RESULT))
    result_row = (query_row - tile * GROUPS * ROWS + row).to(gl.int64)
    result_place = result_row[:, None] * width + head_column[None, :]
    result = (result * (1.0 / total)[:, None]).to(keys.dtype)
    gl.store(result_ptr + result_place, result, mask=is_row[:, None])
    log_sum_exp = (shift + gl.log2(total)) * LN_2
    gl.store(sum_ptr + head * num_queries + row, log_sum_exp, mask=is_row)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "num_heads"])
def _fast_kernel(
    query_tiles,
    key_tiles,
    value_tiles,
    result_ptr,
    sum_ptr,
    broken_ptr,
    num_queries,
    num_keys,
    num_heads,
    scale,
):
    """Compute GROUPS * ROWS queries of one head per program; grid (tiles of queries, b * heads).

    Args:
        query_tiles: descriptor of the queries (b * num_queries, heads * HEAD_SIZE), ROWS per tile.
        key_tiles: descriptor of the keys (b * num_keys, heads * HEAD_SIZE), KEYS per tile.
        value_tiles: descriptor of the values, with the same shape and tiles as `key_tiles`.
        result_ptr: output, the result in the shape of the queries.
        sum_ptr: output, the log-sum-exp (b, heads, num_queries), float32.
        broken_ptr: output, the number of results that are not finite (b, heads, parts), int32.
        num_queries: queries per sample; likewise `num_keys`.
        num_heads: heads per sample.
        scale: converts a product of query and key to an exponent of 2.
    """
    tile, head = gl.program_id(0), gl.program_id(1)
    batch = head // num_heads
    query_row = batch * num_queries + tile * GROUPS * ROWS
    column = head % num_heads * HEAD_SIZE
    place = (tile, query_row, batch * num_keys, column, gl.cdiv(num_keys, KEYS))
    sizes = (num_queries, num_keys, num_heads * HEAD_SIZE)

    dtype: gl.constexpr = key_tiles.dtype
    queries = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, HEAD_SIZE], query_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_SIZE], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_SIZE], value_tiles.layout)
    shared = (queries, keys, values)

    layout: gl.constexpr = mbarrier.MBarrierLayout()
    query_ready = gl.allocate_shared_memory(gl.int64, [1], layout)
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], layout)
    mbarrier.init(query_ready, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), 1)
        mbarrier.init(value_ready.index(stage), 1)
        mbarrier.init(key_free.index(stage), GROUPS)
        mbarrier.init(value_free.index(stage), GROUPS)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), 1)
    mbarrier.arrive(turns.index(0))
    fence_async_shared()
    barriers = (query_ready, key_ready, value_ready, key_free, value_free, turns)

    tiles = (query_tiles, key_tiles, value_tiles)
    outputs = (result_ptr, sum_ptr, broken_ptr)
    gl.warp_specialize(
        [
            (_attend_group, (outputs, shared, barriers, place, sizes, scale, gl.constexpr(0))),
            (_attend_group, (outputs, shared, barriers, place, sizes, scale, gl.constexpr(1))),
            (_attend_group, (outputs, shared, barriers, place, sizes, scale, gl.constexpr(2))),
            (_load_blocks, (tiles, shared, barriers, place)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, LOADING_REGISTERS],
    )


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_heads", "num_parts", "total_parts"])
def _careful_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    result_ptr,
    sum_ptr,
    broken_ptr,
    tally_ptr,
    num_queries,
    num_keys,
    num_heads,
    num_parts,
    total_parts,
    query_stride,
    key_stride,
    value_stride,
    scale,
):
    """Fallback: recompute the broken parts (ROWS queries each) with the true row maximum.

    There are `total_parts` parts, `num_parts` per head. Each program checks about the same number.
    """
    every = tl.num_programs(0)
    if tl.program_id(0) == 0:
        tl.atomic_add(tally_ptr, total_parts.to(tl.int64))
    mine = tl.program_id(0) + tl.arange(0, CAREFUL_PARTS) * every
    are_broken = tl.load(broken_ptr + mine, mask=mine < total_parts, other=0)
    if tl.max(are_broken, 0) != 0:
        for part in range(tl.program_id(0), total_parts, every):
            if tl.load(broken_ptr + part) != 0:
                tl.atomic_add(tally_ptr + 1, 1)
                _attend_carefully(
                    (query_ptr, key_ptr, value_ptr),
                    (query_stride, key_stride, value_stride),
                    (result_ptr, sum_ptr),
                    (num_queries, num_keys, num_heads),
                    part // num_parts,
                    part % num_parts * ROWS,
                    scale,
                )


@triton.jit
def _attend_carefully(inputs, strides, outputs, sizes, head, first_row, scale):
    """Compute ROWS queries of one head by an online softmax (FlashAttention, algorithm 1)."""
    query_ptr, key_ptr, value_ptr = inputs
    query_stride, key_stride, value_stride = strides
    result_ptr, sum_ptr = outputs
    num_queries, num_keys, num_heads = sizes
    batch = (head // num_heads).to(tl.int64)
    column = (head % num_heads * HEAD_SIZE + tl.arange(0, HEAD_SIZE))[None, :]
    row = first_row + tl.arange(0, ROWS)
    is_row = row < num_queries
    rows = (batch * num_queries + row)[:, None]
    query = tl.load(query_ptr + rows * query_stride + column, mask=is_row[:, None], other=0.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, HEAD_SIZE], tl.float32)
    for start in range(0, num_keys, ROWS):
        key_row = start + tl.arange(0, ROWS)
        is_key = key_row < num_keys
        key_rows = (batch * num_keys + key_row)[:, None]
        key_place = key_ptr + key_rows * key_stride + column
        key = tl.load(key_place, mask=is_key[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        maximum = higher
        total = total * shrink + tl.sum(weights, 1)
        value_place = value_ptr + key_rows * value_stride + column
        value = tl.load(value_place, mask=is_key[:, None], other=0.0)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None])
    result = (result / total[:, None]).to(result_ptr.dtype.element_ty)
    result_place = result_ptr + rows * num_heads * HEAD_SIZE + column
    tl.store(result_place, result, mask=is_row[:, None])
    log_sum_exp = (maximum + tl.log2(total)) * LN_2
    tl.store(sum_ptr + head.to(tl.int64) * num_queries + row, log_sum_exp, mask=is_row)


def attend_on_hopper(
    query: Tensor, key: Tensor, value: Tensor, *, tally: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the attention without mask, dropout or gradient, on a Hopper GPU.

    Args:
        query: (b, n, heads, 64), float16 or bfloat16, aligned to 16 bytes. It is copied if the
            tokens of all samples do not have one common stride.
        key: (b, m, heads, 64), same dtype and alignment.
        value: same shape and dtype as `key`.
        tally: (2,) int64, updated in place. The number of parts of the queries is added to the
            first entry, and the number of parts that the fallback computes to the second.

    Returns:
        The result (b, n, heads, 64), and the log-sum-exp (b, heads, n) of the scores in float32.
    """
    b, n, heads, head_size = query.shape
    assert head_size == HEAD_SIZE.value and b * n * heads > 0, query.shape
    assert key.shape == value.shape == (b, key.shape[1], heads, head_size), (key.shape, value.shape)
    types = {tensor.dtype for tensor in (query, key, value)}
    assert types in ({torch.float16}, {torch.bfloat16}), types
    # The tiles are loaded by the GPU's TMA unit, which needs one stride between all rows.
    rows = [tensor.flatten(2).flatten(0, 1) for tensor in (query, key, value)]
    tiles = [
        TensorDescriptor.from_tensor(tensor, [size.value, head_size], _SHARED)
        for tensor, size in zip(rows, (ROWS, KEYS, KEYS), strict=True)
    ]
    result = query.new_empty(query.shape)
    log_sum_exp = query.new_empty(b, heads, n, dtype=torch.float32)
    num_tiles = triton.cdiv(n, GROUPS.value * ROWS.value)
    broken = query.new_empty(b, heads, num_tiles * GROUPS.value, dtype=torch.int32)
    sizes = (n, key.shape[1], heads)
    with torch.cuda.device(query.device):
        # With fp fusion, a weight needs only one fused multiply-add and one power of 2.
        _fast_kernel[(num_tiles, b * heads)](
            *tiles, result, log_sum_exp, broken, *sizes, _SCALE, num_warps=4, enable_fp_fusion=True
        )
        run_fallback((*rows, result, log_sum_exp), broken, tally, num_keys=key.shape[1])
    return result, log_sum_exp


def run_fallback(
    tensors: Sequence[Tensor], broken: Tensor, tally: Tensor, *, num_keys: int
) -> None:
    """Compute the results of broken parts again, in place.

    Args:
        tensors: queries (b * n, heads * 64), keys and values (b * num_keys, heads * 64), result
            (b, n, heads, 64) and log-sum-exp (b, heads, n). The last two are updated.
        broken: (b, heads, parts) int32; nonzero marks a part (of ROWS results) to compute again.
        tally: see `attend_on_hopper`.
        num_keys: keys per sample.
    """
    *rows, result, _ = tensors
    _, n, heads, _ = result.shape
    num_parts = broken.numel()
    at_least = triton.cdiv(num_parts, CAREFUL_PARTS.value)
    num_programs = max(min(num_parts, CAREFUL_PROGRAMS), at_least)
    sizes = (n, num_keys, heads, broken.shape[-1], num_parts)
    strides = (row.stride(0) for row in rows)
    _careful_kernel[(num_programs,)](
        *tensors, broken, tally, *sizes, *strides, _SCALE, enable_fp_fusion=True
    )
