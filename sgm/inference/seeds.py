"""Where the noise of a video comes from: a seed and what the video is, and nothing else."""

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
    seed = seed % 2**64
    if seed < 2**32:
        sequence = np.random.SeedSequence([seed, line, sample])
    else:  # in a list it would take two places, and so mean the same as another line's
        sequence = np.random.SeedSequence(seed, spawn_key=(line, sample))
    state = sequence.generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
