"""Random seeds, derived from the seed of the run and the place where numbers are drawn."""

from __future__ import annotations

import numpy as np
import torch


def sample_generator(seed: int, line: int, sample: int) -> torch.Generator:
    """The generator of all noise of one video, which depends on these three numbers only.

    Args:
        seed: the seed of the run, any integer.
        line: number of the prompt, from 0.
        sample: number of the video among those of the prompt, from 0.

    Returns:
        A generator on the CPU, so that a seed gives the same noise on every device.
    """
    seed %= 2**64
    if seed < 2**32:
        own_seed = _first_number(np.random.SeedSequence([seed, line, sample]))
    else:  # in a list it takes two entries, and could equal the seed of another line
        own_seed = derived_seed(seed, line, sample)
    return torch.Generator().manual_seed(own_seed)


def derived_seed(seed: int, *place: int) -> int:
    """A seed of 64 bits, derived from `seed` and a place, which is a path of numbers from 0."""
    return _first_number(np.random.SeedSequence(seed % 2**64, spawn_key=place))


def _first_number(sequence: np.random.SeedSequence) -> int:
    """The first 64 bits of a sequence."""
    return int(sequence.generate_state(1, np.uint64)[0])
