"""Writing a file so that its name never stands for half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgm.errors import UserError

_LOW_DISK_BYTES = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to `path` at the end, removed after a failure.

    Raises:
        UserError: writing failed with an OSError (or torch.save's RuntimeError); says why.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "writing it failed"
        if shutil.disk_usage(path.parent).free < _LOW_DISK_BYTES:
            reason = "no space left on device"
        raise UserError(
            f"{path} cannot be written: {reason}; free some space or choose another folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


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
