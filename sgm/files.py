"""Files and folders that are written whole or not at all; versions of installed packages."""

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
    """A temporary path beside `path` to write to.

    At the end the temporary file is renamed to `path`. After a failure it is removed.

    Args:
        path: the file that is written.
        shared: whether other processes may write the same path at the same time. Each process then
            gets its own temporary path, which stays behind if the process is killed.

    Raises:
        UserError: writing failed with an OSError; gives the reason.
    """
    token = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.stem}{token}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # there is no file if nothing could be written
            partial.unlink()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write into.

    At the end it is renamed to `path`. After a failure it is removed.

    Args:
        path: the folder that is made; missing folders above it are made too.

    Raises:
        UserError: `path` exists, or writing failed with an OSError; gives the reason.
    """
    path = expanded(path)
    refuse_existing(path)
    target = Path(os.path.abspath(path))  # since "." and ".." are not names
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
                with suppress(OSError):  # it was not made, or is in use now
                    folder.rmdir()


def refuse_existing(path: Path) -> None:
    """Check that `path` does not exist, so that nothing is overwritten.

    Raises:
        UserError: `path` exists.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is left alone; remove it or name another")


def write_error(path: Path, error: OSError) -> UserError:
    """The error for a failure to write `path`; call this before the partial file is removed.

    Partial files are still there then, so a full disk is recognized.
    """
    reason = error.strerror or "writing it failed"
    with suppress(OSError):  # the folder does not exist any more
        # Errors on a full disk differ: torch's has no errno, ffmpeg's is a broken pipe.
        if error.errno not in _NOT_FULL and shutil.disk_usage(path.parent).free < _LOW_DISK_BYTES:
            reason = "no space left on device"
    advice = "" if error.errno in _NOT_FULL else "free some space or "
    return UserError(f"{path} cannot be written: {reason}; {advice}choose another folder")


def write_torch(state: object, path: Path) -> None:
    """Call torch.save, and turn its errors into OSError. Use it in `new_folder` or `replacing`.

    Raises:
        OSError: the file cannot be written.
    """
    import torch  # imported here, since its import takes seconds

    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's error for a full disk or a missing folder
        raise OSError("torch.save failed") from error


def save_torch(state: object, path: Path) -> None:
    """Write `state` with torch.save, whole or not at all.

    Raises:
        UserError: the file cannot be written; gives the reason.
    """
    with replacing(path) as partial:
        write_torch(state, partial)


def make_output_folder(path: str | Path) -> Path:
    """Create a folder for results, and write a test file to it, before hours of work depend on it.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    folder = Path(path)
    try:
        if path == "":
            raise ValueError("it has an empty name")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except (OSError, ValueError) as error:  # ValueError: also for a NUL in its name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"folder {path} cannot be written to ({reason}); choose another") from None
    return folder


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package name → version of those `packages` that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
