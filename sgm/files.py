"""Writing a file so that its name never stands for half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sgm.errors import UserError

_LOW_DISK_BYTES = 1 << 20


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _LOW_DISK_BYTES
    except OSError:  # the folder itself is gone
        return False


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to `path` at the end, removed after a failure.

    Args:
        path: what is written.
        shared: other processes may write the same path at the same time, so each gets a name of
            its own; one that is killed leaves it behind.

    Raises:
        UserError: writing failed with an OSError; says why.
    """
    token = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.stem}{token}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or "writing it failed"
        if _is_full(path.parent):
            reason = "no space left on device"
        raise UserError(
            f"{path} cannot be written: {reason}; free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is left to remove
            partial.unlink()


def save_torch(state: Any, path: Path) -> None:
    """Write `state` with torch.save, beside `path` first.

    Raises:
        UserError: the file cannot be written; says why.
    """
    import torch  # here, since whoever writes only text need not wait for it

    with replacing(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # what torch makes of a full disk or an absent folder
            raise OSError("torch.save failed") from error


def make_output_folder(path: str | Path) -> Path:
    """Create a folder for results, and try it out, before hours of work depend on it.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise UserError(
            f"folder {path} cannot be written to ({error.strerror}); choose another"
        ) from None
    return folder
