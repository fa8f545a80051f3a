"""Files and folders whose names never stand for half of them; versions of installed packages."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sgm.errors import UserError

_LOW_DISK_BYTES = 1 << 20
_NOT_FULL = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


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
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is left to remove
            partial.unlink()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write into; renamed to `path` at the end.

    After any failure nothing of it is left.

    Args:
        path: what is to be made; folders above it are made too.

    Raises:
        UserError: `path` exists, or writing failed with an OSError; says why.
    """
    path = Path(os.path.expanduser(path))
    refuse_existing(path)
    target = Path(os.path.abspath(path))  # "." and ".." have no name to put beside
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    made = _absent_parents(target)
    finished = False
    try:
        hidden.mkdir(parents=True)
        yield hidden
        os.rename(hidden, target)
        finished = True
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if not finished:
            shutil.rmtree(hidden, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # it was not made, or is in use by now
                    folder.rmdir()


def _absent_parents(path: Path) -> list[Path]:
    """Folders above `path` that do not exist, the deepest first."""
    absent = []
    for folder in path.parents:
        if folder.exists():
            break
        absent.append(folder)
    return absent


def refuse_existing(path: Path) -> None:
    """Nothing that exists is written over.

    Raises:
        UserError: there is something at `path`, or it cannot be looked up.
    """
    try:
        exists = path.exists() or path.is_symlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be looked up ({error.strerror}); choose another output"
        ) from None
    if exists:
        raise UserError(f"{path} exists already and is left alone; remove it or name another")


def write_error(path: Path, error: OSError) -> UserError:
    """The sentence for a failure to write `path`; to be made before what was written is removed."""
    reason = error.strerror or "writing it failed"
    with suppress(OSError):  # raised where the folder itself is gone
        # A full disk has many names: no errno of torch, a broken pipe of ffmpeg.
        if error.errno not in _NOT_FULL and shutil.disk_usage(path.parent).free < _LOW_DISK_BYTES:
            reason = "no space left on device"
    advice = "" if error.errno in _NOT_FULL else "free some space or "
    return UserError(f"{path} cannot be written: {reason}; {advice}choose another folder")


def write_torch(state: Any, path: Path) -> None:
    """torch.save that tells a full disk as an OSError; to be within `new_folder` or `replacing`."""
    import torch  # here, since whoever writes only text need not wait for it

    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch makes of a full disk or an absent folder
        raise OSError("torch.save failed") from error


def save_torch(state: Any, path: Path) -> None:
    """Write `state` with torch.save, beside `path` first.

    Raises:
        UserError: the file cannot be written; says why.
    """
    with replacing(path) as partial:
        write_torch(state, partial)


def make_output_folder(path: str | Path) -> Path:
    """Create a folder for results, and try it out, before hours of work depend on it.

    Raises:
        UserError: it cannot be made or written to.
    """
    if path == "":
        raise UserError("a folder for results has an empty name; choose another")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"folder {path} cannot be written to ({reason}); choose another") from None
    return folder


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
