"""Decoding tile by tile in space, for GPUs with little memory: not the same video, but close."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

# In latents. At 60x90, those of 480x720 pixels, six tiles of 34x36.
TILE, OVERLAP = 36, 8


def decode_tiled(
    decode: Callable[[Tensor], Iterable[Tensor]],
    z: Tensor,
    *,
    factor: int,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> Iterator[Tensor]:
    """The chunks of `decode`, made of overlapping tiles that are blended linearly.

    Each tile is decoded through the whole video before the next one. So a GPU holds the feature
    maps of one tile and what its convolutions keep between chunks. Going through all tiles chunk
    by chunk would keep that of all of them: at 480x720, four times the feature maps of one. What
    remains to grow with the size is the video itself, float32, in the host's memory, where tiles
    are added up. A chunk comes when the last tile has been added to it, so that writing can begin
    while that tile is decoded.

    The decoder's norms take their statistics from a tile, not from all of the frame: this is where
    the result differs. Latents that fit one tile are decoded as ever, to the last bit.

    Args:
        decode: latents of a tile, (b, z, t, h, w), to chunks (b, c, t', factor h, factor w) of the
            video, as they are made; or to none at all, where another process gets them.
        z: (b, z, t, h, w), of the whole frame.
        factor: pixels for each latent, in height and width.
        tile: largest height and width of a tile, in latents.
        overlap: of neighbouring tiles at least, in latents; at most half of `tile`.

    Returns:
        An iterator over the chunks (b, c, t', factor h, factor w), dtype and device as `decode`'s.
    """
    assert 0 < 2 * overlap <= tile, f"an overlap of {overlap} for tiles of {tile}"
    rows, columns = (_spans(size, tile=tile, overlap=overlap) for size in z.shape[3:])
    if len(rows) == len(columns) == 1:
        return iter(decode(z))
    return _blended(decode, z, rows=rows, columns=columns, factor=factor)


def _spans(size: int, *, tile: int, overlap: int) -> list[slice]:
    """Where the tiles lie along one side: as few as cover it, equally long and evenly spread.

    Equal ones need the same memory, which the allocator then hands from one to the next.
    """
    count = max(1, -(-(size - overlap) // (tile - overlap)))
    length = -(-(size + (count - 1) * overlap) // count)
    starts = [(size - length) * index // max(1, count - 1) for index in range(count)]
    return [slice(start, start + length) for start in starts]


def _shares(spans: list[slice]) -> Tensor:
    """What each of n tiles gives to each pixel along one side: (n, size), each column's sum is 1.

    The weight is a pixel's distance from the nearer end of the tile, over the sum of all tiles'.
    Where two overlap that is linear; where there is one it is 1.
    """
    ends = torch.tensor([[span.start, span.stop] for span in spans])  # (n, 2)
    centers = torch.arange(spans[-1].stop) + 0.5
    distances = torch.minimum(centers - ends[:, :1], ends[:, 1:] - centers).clamp_(min=0)
    return distances / distances.sum(dim=0)


def _blended(
    decode: Callable[[Tensor], Iterable[Tensor]],
    z: Tensor,
    *,
    rows: list[slice],
    columns: list[slice],
    factor: int,
) -> Iterator[Tensor]:
    """See `decode_tiled`; `rows` and `columns` are in latents."""
    sides = []
    for spans in (rows, columns):
        pixels = [slice(factor * span.start, factor * span.stop) for span in spans]
        sides.append(list(zip(spans, pixels, _shares(pixels), strict=True)))
    size = (factor * z.shape[3], factor * z.shape[4])
    sums: list[Tensor] = []
    tiles = list(product(*sides))
    for index, ((row, y, row_share), (column, x, column_share)) in enumerate(tiles):
        share = (row_share[y, None] * column_share[x]).to(z.device)  # (h, w) of the tile
        for number, chunk in enumerate(decode(z[:, :, :, row, column])):
            if index == 0:
                sums.append(torch.zeros(*chunk.shape[:3], *size))
            sums[number][..., y, x] += (chunk.float() * share).cpu()
            if index == len(tiles) - 1:
                yield sums[number].to(chunk)
