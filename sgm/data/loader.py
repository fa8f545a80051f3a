"""Batches of training data, each sample drawn with random numbers of its own.

What a sample looks like (its window of the clip) and what happens to it (its noise level, noise,
dropped caption, LoRA dropout) is drawn from generators that are seeded anew for it. So a run that
is resumed draws what it would have drawn, and where samples go, to which process or which part of
an accumulated batch, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from sgm.data.frames import difference_in_length
from sgm.errors import UserError
from sgm.seeds import derived_seed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset


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


_HINT = "set {key} to 1, or lower max_num_frames"


def check_lengths(parts: Iterable[Dataset], *, batch_size: int, key: str) -> None:
    """Check that the samples of all `parts` can share batches; `key` gives their size.

    Raises:
        UserError: they cannot, since clips differ in length.
    """
    lengths = [length for part in parts for length in getattr(part, "item_lengths", ())]
    difference = difference_in_length(lengths)
    if batch_size > 1 and difference:
        raise UserError(f"{difference} of {batch_size}; {_HINT.format(key=key)}")


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples, in a worker process.

    Raises:
        UserError: they differ in length.
    """
    shapes = {
        tuple(value.shape for value in sample.values() if isinstance(value, Tensor))
        for sample in samples
    }
    if len(shapes) > 1:
        keys = "train_micro_batch_size_per_gpu and eval_batch_size"
        raise UserError(
            f"clips of different lengths cannot share a batch; {_HINT.format(key=keys)}"
        )
    return default_collate(samples)


def checked_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader.

    Raises:
        UserError: a worker process found the data unusable, or that clips differ in length, or was
            ended.
    """
    try:
        yield from loader
    except UserError as error:
        # From a worker it comes with that process's stack trace, and the sentence last.
        sentence = str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]
        raise UserError(sentence) from None
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # it was raised in one
            raise
        raise UserError(
            f"a process that reads data was ended ({str(error).splitlines()[0]}): memory may be "
            "short, or shared memory (docker run --shm-size=16g); lower num_workers or set "
            "cache_dir, of which much less is read"
        ) from None
