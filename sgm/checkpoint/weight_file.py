"""Weight files. Finding them does not need PyTorch; each file is read once, on its first use."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from sgm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_BYTES = 512  # read from the start of a file to recognize its kind
LONGEST_QUOTE = 60  # characters of a wrong value that a message quotes
_LARGEST_JSON = 1 << 26  # bytes; the index of a large model has about 100 kB
# The first bytes of files that are often saved in place of the right file → text of the error.
_OTHER_HEADS = {
    (b"<!doctype", b"<html", b"<?xml", b"<head"): "is a web page, not the file itself: the "
    "download link answered with HTML; download it again",
    (b"version https://git-lfs",): "is a git-lfs pointer, not the file itself; run 'git lfs "
    "pull' in its folder",
}


def damaged(path: str | Path, reason: str) -> UserError:
    """Return the error for a file that is incomplete, damaged or of another kind.

    Args:
        path: the file, or its name in messages.
        reason: a clause that follows the path, such as "is cut off".
    """
    return UserError(f"{path} {reason}; download or copy it again")


def incomplete(folder: str | Path, what: str) -> UserError:
    """Return the error for a folder that was not copied completely.

    Args:
        folder: the folder, or its name in messages.
        what: the missing file, folder or contents.
    """
    return UserError(f"{folder} lacks {what}; copy it there from the original")


class Contents(NamedTuple):
    """The contents of a weight file.

    `state` is the saved object; its tensors are mapped from disk or read on access. `metadata` is
    the metadata in the header of a safetensors file. `file` is the open file.
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
    """A weight file. The first `read` maps the file, which stays mapped until `release`.

    Attributes:
        kept: if true, `release` has no effect, and `read` reads the file again if it has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = False
        self._contents: Contents | None = None
        self._state: FileState | None = None  # of the file when it was read

    def read(self, *, lazily: bool = False) -> Contents:
        """Return the contents of the file. Arguments and errors are as in `read_weights`."""
        # If a file is changed in place, its mapped tensors change too, or the process crashes.
        if self._contents is None or (self.kept and not self.is_as_read):
            from sgm.checkpoint import reading  # not at the top, because it imports PyTorch

            self._state = state_of(self.path)
            self._contents = reading.read_weights(self.path, lazily=lazily)
        return self._contents

    def tensors(self, *, lazily: bool = False) -> Mapping[str, Tensor]:
        """Return the name → tensor mapping in the file; see `tensors_of`."""
        from sgm.checkpoint import reading

        return reading.tensors_of(self.read(lazily=lazily).state, self.path)

    def open(self) -> BinaryIO:
        """Open the file at its start, unbuffered.

        After `read` this is the mapped file, even if another file has replaced it at its path.

        Raises:
            OSError: the file cannot be opened.
        """
        if self._contents is None:
            return self.path.open("rb", buffering=0)
        file = os.fdopen(os.dup(self._contents.file.descriptor), "rb", buffering=0)
        file.seek(0)
        return file

    @property
    def is_as_read(self) -> bool:
        """Whether the file is unchanged since it was read; true if it has not been read."""
        return self._state in (None, state_of(self.path))

    def release(self) -> None:
        """Unmap the file. Its memory is freed as soon as none of its tensors is in use."""
        if not self.kept:
            self._contents = None


@dataclass(frozen=True, eq=False)
class Weights:
    """The files of one set of weights, as the functions in `sgm.checkpoint.find` return them.

    Args:
        given: the path as the user gave it.
        option: the option that gave the path, for messages.
        path: the file (in SAT format, or of a LoRA) or the folder.
        files: the files that contain tensors.
        beside: other files that belong to the weights, such as the index of the shards.
        config: the content of the folder's ``config.json``; empty if `path` is a file.
    """

    given: str | Path
    option: str
    path: Path
    files: tuple[WeightFile, ...]
    beside: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_file(cls, given: str | Path, path: Path, option: str) -> Weights:
        """Return weights that consist of one file."""
        return cls(given, option, path, (WeightFile(path),))

    def __str__(self) -> str:
        return str(self.given)

    def __repr__(self) -> str:
        return repr(str(self.given))  # shown in messages

    @property
    def is_folder(self) -> bool:
        """Whether the weights are a folder with a ``config.json``."""
        return bool(self.config)

    @property
    def file(self) -> WeightFile:
        """The weight file, for weights that consist of one file."""
        (file,) = self.files
        return file

    @property
    def sources(self) -> list[Path]:
        """All files that belong to the weights, in a fixed order."""
        return [*self.beside, *(file.path for file in self.files)]

    def state(self) -> list[FileState | None]:
        """Return the state of each file in `sources`; it changes when the file is written again."""
        return [state_of(path) for path in self.sources]

    def is_unchanged(self, since: list[FileState | None]) -> bool:
        """Return whether no file has changed since `since` (from `state`) or since it was read."""
        return self.state() == since and all(file.is_as_read for file in self.files)

    def keep(self) -> None:
        """From now on, keep the files mapped, so that later uses do not read them again."""
        for file in self.files:
            file.kept = True

    def release(self) -> None:
        """Unmap the files; the next use of their tensors reads them again."""
        for file in self.files:
            file.release()


# The device, inode, size in bytes and modification time in nanoseconds of a file.
FileState = tuple[int, int, int, int]


def state_of(path: Path) -> FileState | None:
    """Return the state of a file, which changes with every write; None if the file is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; it is closed at the end of the context.

    Raises:
        UserError: the file is missing or unreadable, or it is clearly not the right file: it is
            empty, an HTML page or a git-lfs pointer.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path in the configuration")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            if not head:
                raise damaged(path, "is empty")
            for starts, what in _OTHER_HEADS.items():
                if head.lstrip().lower().startswith(starts):
                    raise UserError(f"{path} {what}")
            file.seek(0)
            yield file
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from None


def check_kind(path: Path) -> None:
    """Check that a file can be read and is not clearly the wrong file; see `open_file`.

    Raises:
        UserError: as in `open_file`.
    """
    with open_file(path):
        pass


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is missing, damaged or larger than 64 MiB, or is not a JSON object.
    """
    with open_file(path) as file:
        text = file.read(_LARGEST_JSON + 1)
    return json_object(text if len(text) <= _LARGEST_JSON else "", path)


def json_object(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """Return the object in a JSON text.

    Args:
        text: the JSON text; bytes must be UTF-8.
        where: the file, or another name in messages for the source of the text.

    Raises:
        UserError: the text is damaged or is not a JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # ValueError also if bytes are not UTF-8
        found = None
    if not isinstance(found, dict):
        raise damaged(where, "is damaged: it is not a JSON object")
    return found
