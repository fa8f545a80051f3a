"""A weight file: found by its path without PyTorch, and read once, when its contents are needed."""

from __future__ import annotations

import json
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
    that of a safetensors header.
    """

    state: Any
    metadata: Mapping[str, str]


class WeightFile:
    """A file of weights. It is read at the first `read`, and then stays mapped until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents: Contents | None = None

    def read(self, *, lazily: bool = False) -> Contents:
        """The contents of the file; arguments and errors as in `read_weights`."""
        if self._contents is None:
            from sgm.checkpoint import reading  # it imports PyTorch

            self._contents = reading.read_weights(self.path, lazily=lazily)
        return self._contents

    def tensors(self, *, wrapper: str, lazily: bool = False) -> Mapping[str, Tensor]:
        """The name → tensor mapping in the file; see `tensors_of`."""
        from sgm.checkpoint import reading

        return reading.tensors_of(self.read(lazily=lazily).state, self.path, wrapper=wrapper)

    def release(self) -> None:
        """Give the mapping of the file back, once no tensor of it is used."""
        self._contents = None


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
