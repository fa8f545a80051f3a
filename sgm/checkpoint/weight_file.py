"""Weight files: found by their paths without PyTorch, and read once, when they are needed."""

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

_HEAD_BYTES = 512  # of a file, which show what kind of file it is
LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats
_LARGEST_JSON = 1 << 26  # bytes; the index of a large model has some 100 kB
# How files begin that stand in the place of the right one, and what messages say of them.
_OTHER_HEADS = {
    (b"<!doctype", b"<html", b"<?xml", b"<head"): "is a web page, not the file itself: the "
    "download link answered with HTML; download it again",
    (b"version https://git-lfs",): "is a pointer of git-lfs, not the file itself; run 'git lfs "
    "pull' there",
}


def damaged(path: str | Path, reason: str) -> UserError:
    """The error for a file that is incomplete, damaged or a file of another kind.

    Args:
        path: the file, or what messages call it.
        reason: a clause that follows the path, such as "is cut off".
    """
    return UserError(f"{path} {reason}; download or copy it again")


def incomplete(folder: str | Path, what: str) -> UserError:
    """The error for a folder that was not copied completely.

    Args:
        folder: the folder, or what messages call it.
        what: the missing file, folder or contents.
    """
    return UserError(f"{folder} lacks {what}; copy it there from the original")


class Contents(NamedTuple):
    """The contents of a weight file.

    `state` is the saved object; its tensors are mapped from disk, or read on access. `metadata` is
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
    """A file of weights. The first `read` reads it; it then stays mapped until `release`.

    Attributes:
        kept: `release` has no effect; a file that was read is read again only if it has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = False
        self._contents: Contents | None = None
        self._state: FileState | None = None  # when it was read

    def read(self, *, lazily: bool = False) -> Contents:
        """The contents of the file; arguments and errors as in `read_weights`."""
        # A change in place would show in the mapped tensors, or end the process.
        if self._contents is None or (self.kept and not self.is_as_read):
            from sgm.checkpoint import reading  # it imports PyTorch

            self._state = state_of(self.path)
            self._contents = reading.read_weights(self.path, lazily=lazily)
        return self._contents

    def tensors(self, *, lazily: bool = False) -> Mapping[str, Tensor]:
        """The name → tensor mapping in the file; see `tensors_of`."""
        from sgm.checkpoint import reading

        return reading.tensors_of(self.read(lazily=lazily).state, self.path)

    def open(self) -> BinaryIO:
        """The file from its start, unbuffered; after `read` the very file that is mapped.

        Raises:
            OSError: it cannot be opened.
        """
        if self._contents is None:
            return self.path.open("rb", buffering=0)
        file = os.fdopen(os.dup(self._contents.file.descriptor), "rb", buffering=0)
        file.seek(0)
        return file

    @property
    def is_as_read(self) -> bool:
        """Whether the file has not changed since it was read; true if it was not read."""
        return self._state in (None, state_of(self.path))

    def release(self) -> None:
        """Drop the mapping of the file. Memory is freed once no tensor of it is used."""
        if not self.kept:
            self._contents = None


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights that were found: files that belong together.

    Args:
        given: the path as the user gave it.
        option: the option that gave it, for messages.
        path: of the one file of SAT format or of a LoRA, or of the folder.
        files: those that hold tensors.
        beside: other files that the tensors depend on.
        config: the content of a folder's ``config.json``; empty for a file.
    """

    given: str | Path
    option: str
    path: Path
    files: tuple[WeightFile, ...]
    beside: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_file(cls, given: str | Path, path: Path, option: str) -> Weights:
        """Weights in one file."""
        return cls(given, option, path, (WeightFile(path),))

    def __str__(self) -> str:
        return str(self.given)

    def __repr__(self) -> str:
        return repr(str(self.given))  # in messages it stands for the path

    @property
    def is_folder(self) -> bool:
        """Whether the weights are a folder with a ``config.json``."""
        return bool(self.config)

    @property
    def file(self) -> WeightFile:
        """The file of weights that are one file."""
        (file,) = self.files
        return file

    @property
    def sources(self) -> list[Path]:
        """All files that the tensors depend on, in a fixed order."""
        return [*self.beside, *(file.path for file in self.files)]

    def state(self) -> list[FileState | None]:
        """The state of each source, which changes when the file is written again."""
        return [state_of(path) for path in self.sources]

    def is_unchanged(self, since: list[FileState | None]) -> bool:
        """Whether no file was written again since this `state`, or since it was read."""
        return self.state() == since and all(file.is_as_read for file in self.files)

    def keep(self) -> None:
        """Keep the files mapped from now on, so that no later use reads them again."""
        for file in self.files:
            file.kept = True

    def release(self) -> None:
        """Drop the mappings of the files; the next use of tensors reads them again."""
        for file in self.files:
            file.release()


# Of a file: its device, inode, size in bytes and time of the last change in nanoseconds.
FileState = tuple[int, int, int, int]


def state_of(path: Path) -> FileState | None:
    """The state of a file, which changes when the file is written again; None if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading from its start; it is closed at the end of the context.

    Raises:
        UserError: it is missing, cannot be read, or is recognisably not the right file: it is
            empty, an HTML page or a pointer of git-lfs.
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
    """Check that a file can be read and is not recognisably another one, as in `open_file`.

    Raises:
        UserError: as in `open_file`.
    """
    with open_file(path):
        pass


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing or damaged, or does not hold an object.
    """
    with open_file(path) as file:
        text = file.read(_LARGEST_JSON + 1)
    return json_object(text if len(text) <= _LARGEST_JSON else "", path)


def json_object(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """The object in a text of JSON.

    Args:
        text: the JSON, in UTF-8 if it is bytes.
        where: the file, or what messages call the place of the text.

    Raises:
        UserError: the text is damaged, or does not hold an object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # also of bytes that are not UTF-8
        found = None
    if not isinstance(found, dict):
        raise damaged(where, "is damaged: it is not an object in JSON")
    return found
