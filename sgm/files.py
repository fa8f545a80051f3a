"""Atomic writing of files and folders, and versions of installed packages."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sgm.errors import UserError

_LOW_DISK_BYTES = 1 << 20
_NOT_FULL = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


def expanded(path: str | Path) -> Path:
    """The path with the home directory for ``~``; an unknown user's ``~name`` is left as it is."""
    return Path(os.path.expanduser(path))


def exists(path: str | Path) -> bool:
    """Whether there is something at the expanded path; False for a name that is not possible."""
    return os.path.exists(expanded(path))


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to.

    At the end the temporary file is renamed to `path`. After a failure it is removed.

    Args:
        path: the file to write.
        shared: true if other processes may write the same path at the same time. Each process then
            gets its own temporary path, and leaves the temporary file behind if it is killed.

    Raises:
        UserError: writing failed with an OSError; the message gives the reason.
    """
    token = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.stem}{token}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # the file does not exist if nothing could be written
            partial.unlink()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden temporary folder beside `path` to write into.

    At the end the temporary folder is renamed to `path`. After a failure it is removed.

    Args:
        path: the folder to create; its missing parent folders are created too.

    Raises:
        UserError: `path` exists, or writing failed with an OSError; the message gives the reason.
    """
    path = expanded(path)
    refuse_existing(path)
    target = Path(os.path.abspath(path))  # because "." and ".." are not names
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    made = list(itertools.takewhile(lambda folder: not folder.exists(), target.parents))
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
                with suppress(OSError):  # the folder was not created, or is in use now
                    folder.rmdir()


def refuse_existing(path: Path) -> None:
    """Check that `path` does not exist yet, so that nothing is overwritten.

    Raises:
        UserError: `path` exists.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; remove it or choose another path")


def write_error(path: Path, error: OSError) -> UserError:
    """Return a UserError for `error`, a failure to write `path`.

    Call this before the partial file is removed: a full disk can only be detected while the
    partial file still occupies space.
    """
    reason = error.strerror or "writing it failed"
    with suppress(OSError):  # disk_usage fails if the folder no longer exists
        # On a full disk, torch's error has no errno, and ffmpeg's is a broken pipe.
        if error.errno not in _NOT_FULL and shutil.disk_usage(path.parent).free < _LOW_DISK_BYTES:
            reason = "no space left on device"
    advice = "" if error.errno in _NOT_FULL else "free some space or "
    return UserError(f"{path} cannot be written: {reason}; {advice}choose another folder")


def write_torch(state: object, path: Path) -> None:
    """Call torch.save, and convert its errors to OSError.

    Use this within `new_folder` or `replacing`, which handle an OSError.

    Raises:
        OSError: the file cannot be written.
    """
    import torch  # imported here, because this takes seconds

    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's error for a full disk or a missing folder
        raise OSError("torch.save failed") from error


def save_torch(state: object, path: Path) -> None:
    """Write `state` with torch.save to a temporary file, which is then renamed to `path`.

    Raises:
        UserError: the file cannot be written; the message gives the reason.
    """
    with replacing(path) as partial:
        write_torch(state, partial)


def make_output_folder(path: str | Path) -> Path:
    """Create a folder for results, and write a test file to it.

    Call this before hours of work whose results go to the folder.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    folder = Path(path)
    try:
        if path == "":
            raise ValueError("its name is empty")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except (OSError, ValueError) as error:  # a NUL in the name is also a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"folder {path} cannot be written to ({reason}); choose another folder"
        ) from None
    return folder


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the name and version of each of the `packages` that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
