"""Batches of a data loader, whose failures become sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sgm.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def checked_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader.

    Raises:
        UserError: clips of a batch differ in length, or a worker process found the data unusable.
    """
    try:
        yield from loader
    except UserError as error:
        # From a worker it comes with that process's stack trace, and the sentence last.
        sentence = str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]
        raise UserError(sentence) from None
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise UserError(
            "clips of different lengths cannot share a batch; set "
            "train_micro_batch_size_per_gpu and eval_batch_size to 1, or lower max_num_frames"
        ) from None
