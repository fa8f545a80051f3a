"""Batches of a data loader, whose failures become sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import default_collate

from sgm.data.frames import difference_in_length
from sgm.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

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
