"""Decoding in tiles: their places, how they are blended, and what equals decoding without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arguments import parse_config
from sgm.config import SamplingArgs
from sgm.engine import SATVideoDiffusionEngine
from sgm.loading import load_engine
from sgm.models.tiled_decoding import TILE, decode_tiled
from sgm.util import check_params, instantiate_from_config
from tests.conftest import OLD_NAMES

ROOT = Path(__file__).parents[2]


def small_vae() -> nn.Module:
    torch.manual_seed(0)
    node = parse_config(SamplingArgs, "", ["--base", str(OLD_NAMES)]).model["first_stage_config"]
    return instantiate_from_config(node).eval().requires_grad_(False)


def latents(*size: int) -> Tensor:
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))


class Enlarging:
    """A decoder that repeats each latent as 8x8 pixels, one frame per chunk; records the order."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.events: list[str] = []

    def __call__(self, z: Tensor) -> Iterator[Tensor]:
        self.sizes.append(tuple(z.shape[3:]))
        tile = len(self.sizes)
        for index, frame in enumerate(z.split(1, dim=2)):
            self.events.append(f"tile {tile}, chunk {index}")
            yield frame.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


@pytest.mark.parametrize(
    ("size", "number", "tile"),
    [
        ((60, 90), 6, (34, 36)),  # 480x720: 2 by 3 tiles, 2 * 34 - 60 = 8 and 3 * 36 - 90 = 2 * 9
        ((37, 36), 2, (23, 36)),
        ((5, 101), 4, (5, 32)),
    ],
)
def test_tiles_are_alike_and_together_give_every_pixel_its_whole_value(size, number, tile):
    decode, z = Enlarging(), latents(3, *size)
    chunks = list(decode_tiled(decode, z, factor=8))
    assert decode.sizes == [tile] * number
    # The weights of a pixel add up to 1 within four rounding errors.
    expected = torch.cat(list(Enlarging()(z)), dim=2)
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=1e-6, atol=1e-6)


def test_an_overlap_goes_linearly_from_one_tile_to_the_other():
    values = iter([0.0, 1.0])  # of the two tiles, columns 0 to 3 and 2 to 5

    def decode(z: Tensor) -> list[Tensor]:
        return [torch.full((1, 3, 1, 2, 8), next(values))]

    (chunk,) = decode_tiled(decode, latents(1, 1, 6), factor=2, tile=4, overlap=2)
    # The overlap is 4 pixels, their centres at 1/8, 3/8, 5/8 and 7/8 of it.
    expected = torch.tensor([0, 0, 0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1, 1, 1])
    torch.testing.assert_close(chunk, expected.expand(1, 3, 1, 2, 12))


def test_one_tile_is_through_with_before_the_next_and_the_last_one_streams():
    decode = Enlarging()
    chunks = decode_tiled(decode, latents(2, 4, 6), factor=8, tile=4, overlap=2)
    next(chunks)
    assert decode.events == [f"tile {at}" for at in ("1, chunk 0", "1, chunk 1", "2, chunk 0")]


def test_each_tile_is_decoded_as_a_video_of_its_own():
    vae, z = small_vae(), latents(5, 2, 6)
    chunks = list(decode_tiled(vae.decode_streamed, z, factor=8, tile=4, overlap=2))
    assert [chunk.shape[2] for chunk in chunks] == [9, 8]
    left, right = vae.decode(z[..., :4]), vae.decode(z[..., 2:])  # 32 columns each, 16 in common
    part = (torch.arange(16) + 0.5) / 16
    seam = left[..., 16:] * (1 - part) + right[..., :16] * part
    expected = torch.cat([left[..., :16], seam, right[..., 16:]], dim=4)
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=1e-6, atol=1e-5)


def test_what_fits_one_tile_is_decoded_as_without_tiles_to_the_bit():
    vae, z = small_vae(), latents(5, 4, 3)
    tiled = decode_tiled(vae.decode_streamed, z, factor=8, tile=4, overlap=2)
    assert all(map(torch.equal, tiled, vae.decode_streamed(z)))


def test_half_types_stay_what_they_are():
    z = latents(2, 4, 6).bfloat16()
    chunks = list(decode_tiled(Enlarging(), z, factor=8, tile=4, overlap=2))
    assert chunks[0].dtype == torch.bfloat16
    # Blended in float32, so that equal values come out as they were.
    assert torch.equal(torch.cat(chunks, dim=2), torch.cat(list(Enlarging()(z)), dim=2))


def test_a_process_that_gets_no_chunks_takes_part_in_every_tile():
    seen: list[Tensor] = []

    def decode(z: Tensor) -> list[Tensor]:  # as of `decode_together`, but on the first process
        seen.append(z)
        return []

    assert list(decode_tiled(decode, latents(3, 4, 6), factor=8, tile=4, overlap=2)) == []
    assert [tuple(z.shape) for z in seen] == [(1, 4, 3, 4, 4)] * 2


def test_the_engine_decodes_in_tiles_where_it_is_asked_to(small_model):
    engine = SATVideoDiffusionEngine(
        **check_params(SATVideoDiffusionEngine, small_model, where="model")
    )
    scaled = latents(1, 1, TILE + 4).transpose(1, 2)  # (b, t, c, h, w)
    whole = next(engine.decode_first_stage(scaled))
    engine.tile_decode = True
    tiled = next(engine.decode_first_stage(scaled))
    vae = engine.first_stage_model
    z = (scaled / engine.scale_factor).transpose(1, 2)
    expected = next(decode_tiled(vae.decode_streamed, z, factor=8)).transpose(1, 2)
    assert torch.equal(tiled, expected) and not torch.equal(tiled, whole)


@pytest.mark.parametrize("flags", [["--tile-decode"], []])
def test_the_flag_reaches_the_engine(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    base = ["--base", "configs/cogvideox_tiny_infer.yaml"]
    config = parse_config(SamplingArgs, "", [*base, *flags])
    assert load_engine(config, torch.device("cpu")).tile_decode == bool(flags)
