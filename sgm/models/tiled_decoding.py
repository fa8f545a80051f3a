"""Decoding in spatial tiles, for GPUs with little memory; this changes the video slightly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

# In latents. A frame of 60x90 latents (480x720 pixels) is split into six tiles of 34x36.
TILE, OVERLAP = 36, 8


def decode_tiled(
    decode: Callable[[Tensor], Iterable[Tensor]],
    z: Tensor,
    *,
    factor: int,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> Iterator[Tensor]:
    """Yield the chunks of `decode`, made from overlapping tiles that are blended linearly.

    Each tile is decoded to the end of the video before the next tile begins, so the GPU holds the
    feature maps and the cached frames of only one tile. Decoding all tiles chunk by chunk would
    need the cached frames of all tiles: at 480x720, four times the memory of one tile's feature
    maps. The tiles are summed in host memory, in a float32 video; only this memory grows with the
    size of the video. A chunk is yielded as soon as its last tile has been added, so the caller can
    write it while the last tile is still being decoded.

    The result differs from decoding without tiles, because the decoder's norms use the statistics
    of a tile instead of the whole frame. Latents that fit into one tile are decoded without tiling,
    with bit-identical results.

    Args:
        decode: takes the latents of a tile, (b, z, t, h, w), and yields the tile's video in chunks
            (b, c, t', factor * h, factor * w). It yields nothing if another process gets the
            chunks.
        z: (b, z, t, h, w), the latents of the whole frame.
        factor: pixels per latent, in height and in width.
        tile: largest height and width of a tile, in latents.
        overlap: smallest overlap of neighbouring tiles, in latents; at most half of `tile`.

    Yields:
        Chunks (b, c, t', factor * h, factor * w), with the dtype and device that `decode` yields.
    """
    assert 0 < 2 * overlap <= tile, f"an overlap of {overlap} for tiles of {tile}"
    rows, columns = (_spans(size, tile=tile, overlap=overlap) for size in z.shape[3:])
    if len(rows) == len(columns) == 1:
        yield from decode(z)
        return
    sides = []
    for spans in (rows, columns):
        pixels = [slice(factor * span.start, factor * span.stop) for span in spans]
        sides.append(list(zip(spans, pixels, _weights(pixels), strict=True)))
    size = (factor * z.shape[3], factor * z.shape[4])
    sums: list[Tensor] = []
    tiles = list(product(*sides))
    for index, ((row, y, row_weight), (column, x, column_weight)) in enumerate(tiles):
        weight = (row_weight[y, None] * column_weight[x]).to(z.device)  # (h, w) of the tile
        for number, chunk in enumerate(decode(z[:, :, :, row, column])):
            if index == 0:
                sums.append(torch.zeros(*chunk.shape[:3], *size))
            sums[number][..., y, x] += (chunk.float() * weight).cpu()
            if index == len(tiles) - 1:
                yield sums[number].to(chunk)


def _spans(size: int, *, tile: int, overlap: int) -> list[slice]:
    """Return the fewest tiles that cover one side, with equal lengths and evenly spread.

    Tiles of equal size let the allocator reuse the memory of one tile for the next.
    """
    count = max(1, -(-(size - overlap) // (tile - overlap)))
    length = -(-(size + (count - 1) * overlap) // count)
    starts = [(size - length) * index // max(1, count - 1) for index in range(count)]
    return [slice(start, start + length) for start in starts]


def _weights(spans: list[slice]) -> Tensor:
    """Return the blending weight of each tile for each pixel along one side, (n_tiles, size).

    A weight is the distance of the pixel from the nearer end of the tile, normalised so that the
    weights of all tiles sum to 1. It is linear where two tiles overlap, and 1 where only one tile
    covers the pixel.
    """
    ends = torch.tensor([[span.start, span.stop] for span in spans])  # (n, 2)
    centers = torch.arange(spans[-1].stop) + 0.5
    distances = torch.minimum(centers - ends[:, :1], ends[:, 1:] - centers).clamp_(min=0)
    return distances / distances.sum(dim=0)
