"""A folder of kept tensors, which several processes and several runs may use at the same time."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from sgm.errors import UserError
from sgm.files import make_output_folder, replacing

logger = logging.getLogger(__name__)

# Nothing that is being written takes so long; what is older, a killed process has left.
_LEFTOVER_SECONDS = 3600.0


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed has left half-written in a folder."""
    for path in folder.glob(".*.partial.*"):
        with suppress(OSError):  # another process may have removed it
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class Store:
    """Entries of one tensor each, ``{folder}/{key}.safetensors``.

    Args:
        folder: where they are.
        name: of the tensor in each of them.
    """

    folder: Path
    name: str

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.folder / f"{key}.safetensors"

    def prepare(self) -> None:
        """Make the folder, and remove what a process that was killed has left in it.

        Raises:
            UserError: it cannot be made or written to.
        """
        make_output_folder(self.folder)
        remove_leftovers(self.folder)

    def holds(self, key: str) -> bool:
        """Whether the entry is there and whole; names one that is damaged."""
        path = self.path(key)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                if set(file.keys()) == {self.name}:
                    return True
                reason = f"it holds no {self.name}"
        except (SafetensorError, OSError) as error:
            reason = str(error)
        logger.warning("%s is damaged (%s) and is made anew", path, reason)
        return False

    def read(self, key: str) -> Tensor:
        """The tensor of an entry.

        Raises:
            UserError: the entry is absent or damaged.
        """
        path = self.path(key)
        try:
            # Read, not mapped: a file that is cut while it is mapped would end the process.
            return load(path.read_bytes())[self.name]
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(
                f"the cache entry {path} cannot be read ({error}); start again to make it anew "
                "(processes on several hosts need a cache_dir on a disk that they share)"
            ) from None

    def write(self, key: str, tensor: Tensor) -> None:
        """Make an entry, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        with replacing(self.path(key), shared=True) as partial:
            partial.write_bytes(save({self.name: tensor.contiguous().cpu()}))
