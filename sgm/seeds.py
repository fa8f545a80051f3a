"""Derive random seeds from the seed of the run and the place where random numbers are drawn."""

from __future__ import annotations

import numpy as np
import torch


def sample_generator(seed: int, line: int, sample: int) -> torch.Generator:
    """Return the generator for all noise of one video, which depends only on the arguments.

    Args:
        seed: the seed of the run, any integer.
        line: index of the prompt, from 0.
        sample: index of the video among all videos of the prompt, from 0.

    Returns:
        A generator on the CPU, so that a seed gives the same noise on every device.
    """
    seed %= 2**64
    if seed < 2**32:
        own_seed = _first_number(np.random.SeedSequence([seed, line, sample]))
    else:  # a large seed takes two entries of the list, which could equal those of another line
        own_seed = derived_seed(seed, line, sample)
    return torch.Generator().manual_seed(own_seed)


def derived_seed(seed: int, *place: int) -> int:
    """Return a 64-bit seed derived from `seed` and `place`, a sequence of numbers from 0."""
    return _first_number(np.random.SeedSequence(seed % 2**64, spawn_key=place))


def _first_number(sequence: np.random.SeedSequence) -> int:
    """Return the first 64 bits that `sequence` generates."""
    return int(sequence.generate_state(1, np.uint64)[0])
