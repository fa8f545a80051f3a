"""Where random numbers come from: a seed and the place they are for, and nothing else."""

from __future__ import annotations

import numpy as np
import torch


def sample_generator(seed: int, line: int, sample: int) -> torch.Generator:
    """The source of all noise of one video, which depends on nothing but these three numbers.

    Args:
        seed: the run's, any integer.
        line: number of the prompt, from 0.
        sample: number of the video among those of the prompt, from 0.

    Returns:
        A generator on the CPU, so that a seed means the same everywhere.
    """
    seed %= 2**64
    if seed < 2**32:
        own_seed = _first_number(np.random.SeedSequence([seed, line, sample]))
    else:  # in a list it would take two places, and so mean the same as another line's
        own_seed = derived_seed(seed, line, sample)
    return torch.Generator().manual_seed(own_seed)


def derived_seed(seed: int, *place: int) -> int:
    """A seed of 64 bits for a place in something that `seed` decides, a path of numbers from 0."""
    return _first_number(np.random.SeedSequence(seed % 2**64, spawn_key=place))


def _first_number(sequence: np.random.SeedSequence) -> int:
    """The first 64 bits that a sequence gives."""
    return int(sequence.generate_state(1, np.uint64)[0])
