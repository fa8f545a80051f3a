"""What several processes of a run say alike, said once: by the first of them that comes to say it.

A mistake in a configuration meets every process. With one for each of eight GPUs, the same sentence
would stand there eight times.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = "SAID_BY_RANK"  # environment variable: where it is noted which process said what


@contextmanager
def one_voice() -> Iterator[None]:
    """Processes that are started within it can tell what another has said."""
    with tempfile.TemporaryDirectory(prefix="said-by-rank-") as folder:
        os.environ[_FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[_FOLDER]


def said_by_another(text: str) -> bool:
    """Whether another process of this run has said `text`; if not, it is this one's to say.

    What a process has said it may say again. False outside of `one_voice`.
    """
    folder = os.environ.get(_FOLDER)
    if folder is None:
        return False
    rank = os.environ.get("RANK", "0")
    # Names of files need not be text.
    note = Path(folder) / hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    try:
        with suppress(FileExistsError):
            note.symlink_to(rank)  # made and filled at once, whoever comes at the same time
        return os.readlink(note) != rank
    except OSError:  # the folder is gone or full: better twice than never
        return False
