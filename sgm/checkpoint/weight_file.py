"""A weight file: found by its path without PyTorch, and read once, when its contents are needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sgm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HEAD_BYTES = 512  # of a file, which show what kind of file it is
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


def check_kind(path: Path) -> None:
    """Refuse what is recognisably not the file that should be there.

    Raises:
        UserError: the file is missing, not readable, empty, an HTML page or a pointer of git-lfs.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path in the configuration")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error) from None
    check_head(head, path)


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file that the system does not let this process read."""
    return UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions")


def check_head(head: bytes, path: Path) -> None:
    """As `check_kind`, by the first bytes of the file."""
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
    check_kind(path)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not UTF-8 and not JSON are ValueErrors
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is damaged: it is not an object in JSON; copy it from the original again"
        )
    return found
