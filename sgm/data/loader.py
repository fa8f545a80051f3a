"""Batches of training data. Each sample draws its random numbers from its own seed.

All random choices for a sample (window of the clip, noise level, noise, dropped caption, LoRA
dropout) come from generators that are seeded for this sample. So a resumed run draws the same
numbers as an uninterrupted run. The numbers depend neither on the process that handles the sample
nor on the micro-batch that contains it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from sgm.data.frames import difference_in_length
from sgm.errors import UserError
from sgm.seeds import derived_seed

T = TypeVar("T")

# The kinds of random draws. The kind is part of the seed, so draws of different kinds are
# independent.
ORDER, SAMPLE, STEP, VALIDATION = range(4)


def sample_order(
    num_items: int,
    batch_size: int,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """Yield the batches of one process without end, as lists of (index of the item, its seed).

    All processes share one endless stream of samples. It is a sequence of epochs, each in its own
    random order. Batch k of process r starts at sample start + (k · world_size + r) · batch_size of
    the stream. The number of processes and the batch size may change when a run is resumed, because
    `start` counts samples, not batches.

    Args:
        num_items: length of the dataset.
        batch_size: samples per batch.
        seed: the seed of the run.
        rank: rank of this process among the training processes.
        world_size: number of training processes.
        start: number of samples of the stream that earlier runs have used.
    """
    shuffled_epoch, order = -1, torch.empty(0, dtype=torch.long)
    for first in itertools.count(start + rank * batch_size, world_size * batch_size):
        batch = []
        for sample in range(first, first + batch_size):
            epoch, place = divmod(sample, num_items)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed(derived_seed(seed, ORDER, epoch))
                shuffled_epoch, order = epoch, torch.randperm(num_items, generator=generator)
            batch.append((int(order[place]), derived_seed(seed, SAMPLE, sample)))
        yield batch


class SeededDataset(Dataset):
    """Wraps `dataset`: takes keys (index, seed), and seeds torch's generator for each item."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return self.dataset[index]


def check_lengths(parts: Iterable[Dataset], *, batch_size: int, key: str) -> None:
    """Check that the samples of all `parts` can share batches.

    Args:
        parts: datasets. Datasets without the attribute `item_lengths` are not checked.
        batch_size: samples per batch.
        key: the configuration key that sets `batch_size`, for the error message.

    Raises:
        UserError: samples differ in length, and a batch has more than one.
    """
    lengths = [length for part in parts for length in getattr(part, "item_lengths", ())]
    difference = difference_in_length(lengths)
    if difference and batch_size > 1:
        raise UserError(f"{difference} of {batch_size}; set {key} to 1, or lower max_num_frames")


def checked_batches(loader: Iterable[T]) -> Iterator[T]:
    """Yield the batches of a `DataLoader`, with its errors reworded.

    Raises:
        UserError: the data cannot be used, or a worker process was killed.
    """
    try:
        yield from loader
        return
    except UserError as error:
        # An error from a worker process starts with a stack trace. The message is its last line.
        sentence = str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # an error of the dataset itself
            raise
        sentence = (
            f"a process that reads data was killed ({str(error).splitlines()[0]}), perhaps because "
            "memory or shared memory (docker run --shm-size=16g) is too small; lower num_workers, "
            "or set cache_dir to read much less data"
        )
    raise UserError(sentence)
