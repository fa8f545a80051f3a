"""The noise of a video depends on its seed, its prompt's line and its number only."""

from __future__ import annotations

import itertools

import torch

from sgm.seeds import sample_generator


def draw(seed: int, line: int, sample: int) -> tuple[float, ...]:
    generator = sample_generator(seed, line, sample)
    return tuple(torch.randn(4, generator=generator).tolist())


def test_each_video_has_noise_of_its_own() -> None:
    seeds = (0, 5, 2**32 - 1, 2**32, 5 + 2**32, 2**64 - 1)
    places = list(itertools.product(seeds, range(3), range(3)))
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(-1, 0, 0) == draw(2**64 - 1, 0, 0)  # the same number of 64 bits
    assert draw(5, 1, 2) == draw(5, 1, 2)
