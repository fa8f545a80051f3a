"""Random numbers of a training run: each draw depends on the run's seed and its place alone.

What a sample looks like (its window of the clip) and what happens to it (its noise level, noise,
dropped caption, LoRA dropout) is drawn from generators that are seeded anew for it. So a run that
is resumed draws what it would have drawn, and where samples go, to which process or which part of
an accumulated batch, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from sgm.inference.seeds import derived_seed

# What is drawn; part of the seed, so that draws of different kinds are independent.
ORDER, SAMPLE, STEP, VALIDATION = range(4)


class SampleOrder(Sampler[list[tuple[int, int]]]):
    """The batches of one process, for ever: lists of (index of the item, its seed).

    All processes walk through one endless stream of samples, epoch after epoch, each epoch in its
    own order; batch k of process r takes the samples from (k · world_size + r) · batch_size on.
    Processes and batches may change when a run is resumed: `start` counts samples.

    Args:
        num_items: length of the dataset.
        batch_size: samples of a batch.
        seed: the run's.
        rank, world_size: this process among those that train.
        start: samples of the stream that are done.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.first = start + rank * batch_size
        self.stride = world_size * batch_size
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def _index(self, sample: int) -> int:
        epoch, place = divmod(sample, self.num_items)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, ORDER, epoch))
            self._epoch = epoch
            self._permutation = torch.randperm(self.num_items, generator=generator)
        return int(self._permutation[place])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.first
        while True:
            samples = range(first, first + self.batch_size)
            yield [(self._index(n), derived_seed(self.seed, SAMPLE, n)) for n in samples]
            first += self.stride


class SeededDataset(Dataset):
    """Items of a dataset by (index, seed): what the item draws comes from that seed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return self.dataset[index]
