"""Digests of clips, remembered from one start to the next, so that a folder is read only once."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from sgm.data.cache_keys import hash_file
from sgm.errors import UserError
from sgm.files import replacing

logger = logging.getLogger(__name__)

# A file may be written to again in the tick of the clock in which it was looked at, which its
# times would not show. Two seconds are the longest tick that file systems have.
_TICK_SECONDS = 2.0
_DIGEST = re.compile(r"[0-9a-f]{40}")

# Of a file: its size, the times of the last change of its content and of anything, its number.
_State = tuple[int, int, int, int]


class DigestMemory:
    """`hash_file` for files that may have been digested before, as a file in JSON remembers.

    A digest holds for as long as a file's `_State` does. The time of the last change of anything
    is the system's own, so a change of content shows even where it keeps the size and a program
    sets the file's other times back, as copying does.

    May be used by several threads.

    Args:
        path: the file of ``{path of a clip: [state, digest]}``. One that is absent or damaged
            counts as empty, and clips are read then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        # Digests that are not in the file yet, as they are written to it.
        self.new: dict[str, tuple[_State, str]] = {}

    def digest(self, clip: Path) -> str | None:
        """The digest of a clip's file; None where it cannot be read."""
        name = os.path.abspath(clip)
        try:
            looked_at, state = time.time(), _state(clip)
            known, digest = self._known.get(name, (None, ""))
            if known == state:
                return digest
            digest = hash_file(clip)
            is_settled = looked_at - state[2] / 1e9 > _TICK_SECONDS
            if is_settled and _state(clip) == state:
                self.new[name] = (state, digest)
        except OSError:
            return None
        return digest

    def update(
        self, new: Mapping[str, tuple[_State, str]], *, without: Iterable[Path] = ()
    ) -> None:
        """Write what is `new`, of this and of other processes, to the file.

        What other runs have written to it meanwhile stays, but for the clips `without`.
        """
        clips = list(without)
        if not (new or clips):  # as at most starts; the file may be large
            return
        known = _read(self._path)
        updated = {**known, **new}
        for clip in clips:
            updated.pop(os.path.abspath(clip), None)
        if updated == known:
            return
        try:
            with replacing(self._path, shared=True) as partial:
                partial.write_text(json.dumps(updated), "utf-8")
        except UserError as error:  # the next start reads the clips again, that is all
            logger.debug("%s", error)


def _state(path: Path) -> _State:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _read(path: Path) -> dict[str, tuple[_State, str]]:
    try:
        content = json.loads(path.read_text("utf-8"))
        return {
            name: (tuple(state), digest)
            for name, (state, digest) in content.items()
            if _DIGEST.fullmatch(digest)
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.debug("%s is left out: %s", path, error)
        return {}
