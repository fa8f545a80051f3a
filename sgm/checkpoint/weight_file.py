"""A weight file: found by its path without PyTorch, and read once, when its contents are needed."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from sgm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_BYTES = 512  # of a file, which show what kind of file it is
_LARGEST_JSON = 1 << 26  # bytes; the index of a large model has some 100 kB


class Contents(NamedTuple):
    """What a weight file holds.

    `state` is what was saved, its tensors mapped from disk or read when asked for; `metadata` is
    that of a safetensors header; `file` is the file itself.
    """

    state: Any
    metadata: Mapping[str, str]
    file: OpenFile


class OpenFile:
    """A file that stays open for as long as this object lives."""

    def __init__(self, file: BinaryIO) -> None:
        self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)


class WeightFile:
    """A file of weights. It is read at the first `read`, and then stays mapped until `release`.

    Attributes:
        kept: `release` does nothing; a file that was read is read again only if it has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = False
        self._contents: Contents | None = None
        self._state: FileState | None = None  # as it was read

    def read(self, *, lazily: bool = False) -> Contents:
        """The contents of the file; arguments and errors as in `read_weights`."""
        # A change in place would show in the mapped tensors, or end the process.
        if self._contents is None or (self.kept and not self.is_as_read):
            from sgm.checkpoint import reading  # it imports PyTorch

            self._state = self.state()
            self._contents = reading.read_weights(self.path, lazily=lazily)
        return self._contents

    def tensors(self, *, wrapper: str, lazily: bool = False) -> Mapping[str, Tensor]:
        """The name → tensor mapping in the file; see `tensors_of`."""
        from sgm.checkpoint import reading

        return reading.tensors_of(self.read(lazily=lazily).state, self.path, wrapper=wrapper)

    def open(self) -> BinaryIO:
        """The file from its start, unbuffered; the very file that is mapped, where it was read.

        Raises:
            OSError: it cannot be opened.
        """
        if self._contents is None:
            return self.path.open("rb", buffering=0)
        file = os.fdopen(os.dup(self._contents.file.descriptor), "rb", buffering=0)
        file.seek(0)
        return file

    def state(self) -> FileState | None:
        """What changes where the file is written again; None where it is missing."""
        return state_of(self.path)

    @property
    def is_as_read(self) -> bool:
        """Whether the file has not changed since it was read, if it was."""
        return self._state in (None, self.state())

    def release(self) -> None:
        """Give the mapping of the file back, once no tensor of it is used."""
        if not self.kept:
            self._contents = None


# Of a file: its device, inode, size in bytes and time of the last change in nanoseconds.
FileState = tuple[int, int, int, int]


def state_of(path: Path) -> FileState | None:
    """What changes where a file is written again; None where it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_file(path: Path) -> BinaryIO:
    """The file, opened to be read from its start.

    Raises:
        UserError: it is missing, not readable, or recognisably not the file that should be there:
            empty, an HTML page or a pointer of git-lfs.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path in the configuration")
        file = path.open("rb")
        try:
            _check_head(file.read(_HEAD_BYTES), path)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from None


def check_kind(path: Path) -> None:
    """Refuse what is recognisably not the file that should be there; errors as in `open_file`."""
    open_file(path).close()


def _check_head(head: bytes, path: Path) -> None:
    start = head.lstrip().lower()
    if not head:
        raise UserError(f"{path} is empty; download or copy it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(
            f"{path} is a web page, not the file itself: the download link answered with HTML; "
            "download it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a pointer of git-lfs, not the file itself; run 'git lfs pull' there"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, or is something else.
    """
    try:
        with open_file(path) as file:
            text = file.read(_LARGEST_JSON + 1)
        found = json.loads(text.decode("utf-8")) if len(text) <= _LARGEST_JSON else None
    except (OSError, ValueError, RecursionError):  # not UTF-8 and not JSON are ValueErrors
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is damaged: it is not an object in JSON; copy it from the original again"
        )
    return found
