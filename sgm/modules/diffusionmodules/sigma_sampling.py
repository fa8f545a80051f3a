"""Random noise levels for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sgm.distributed import data_parallel_rank_and_size
from sgm.modules.diffusionmodules.discretizer import NoiseLevels
from sgm.util import instantiate_from_config


class DiscreteSampling:
    """Draws noise levels uniformly.

    With `uniform_sampling`, the range of noise levels is split evenly among the data-parallel
    ranks, and each rank draws from its own part. All ranks together still draw uniformly, and every
    step covers the whole range, so its loss and gradient vary less. Each rank keeps the same part
    of the range, so the data must be shuffled across ranks.

    Args:
        num_idx: number of noise levels, 2..1000; 1000 for the released weights.
        discretization_config: configuration node of the discretization.
        uniform_sampling: split the range among data-parallel ranks.

    Raises:
        UserError: `num_idx` is out of range or the node is invalid.
    """

    def __init__(
        self,
        num_idx: int,
        discretization_config: Mapping[str, Any],
        *,
        uniform_sampling: bool = False,
    ) -> None:
        self.schedule: NoiseLevels = instantiate_from_config(discretization_config)(num_idx)
        self.uniform_sampling = uniform_sampling

    def __call__(self, batch_size: int, *, generator: torch.Generator | None = None) -> NoiseLevels:
        """Draw noise levels for `batch_size` samples, on the generator's device (default: CPU)."""
        device = torch.device("cpu") if generator is None else generator.device
        rank, num_ranks = data_parallel_rank_and_size() if self.uniform_sampling else (0, 1)
        num_idx = len(self.schedule.timesteps)
        # float64: float32 has too few values in [0, 1) to draw 1000 levels with equal probability.
        draws = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64)
        positions = ((rank + draws) * num_idx / num_ranks).long()
        # rank + draw can round up to rank + 1. For the last rank, this is outside the schedule.
        positions = positions.clamp(max=num_idx - 1)
        return NoiseLevels(*(values.to(device)[positions] for values in self.schedule))
