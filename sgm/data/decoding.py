"""Decoding of clips in child processes, so that a crash of the decoder does not stop the run.

A damaged file can make the decoder abort its process or hang. So clips are opened in child
processes only. If a child dies or does not answer in time, the request raises `ClipError`, and the
next request starts a new child.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from sgm.data.frames import ClipError, ClipFacts, FrameSettings
from sgm.distributed import Ranks
from sgm.errors import UserError
from sgm.progress import Progress

# Time limits in seconds: for one request about a clip, and for the start of a child.
CLIP_SECONDS = 60.0
_START_SECONDS = 120.0
_MOST_CHILDREN = 8
_CLIPS_FOR_A_CHILD = 32  # for fewer clips, starting another child takes longer than it saves
_ROOT = Path(__file__).parents[2]


class DecodingProcess:
    """A child process that decodes one clip at a time.

    The child is started by the first request, and again by the first request after a child was
    lost. Several threads may use this object. After a fork, the new process starts a child of its
    own. The child ends with the process that started it, even if that process is killed.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._errors: IO[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def probe(self, path: Path, settings: FrameSettings) -> ClipFacts:
        """Return the properties of a clip. The child decodes its first frame.

        Raises:
            ClipError: the clip is damaged or too short.
            UserError: clips cannot be decoded on this machine.
        """
        return cast("ClipFacts", self._request("probe", path, settings))

    def read(self, path: Path, settings: FrameSettings, *, facts: ClipFacts, first: int) -> Tensor:
        """Decode the frames of an item, resampled to `settings.fps`: uint8 (t, h, w, 3).

        The arguments are those of `sgm.data.clips.read_window`.

        Raises:
            ClipError: as in `sgm.data.clips.read_window`.
            UserError: clips cannot be decoded on this machine.
        """
        frames = cast("np.ndarray", self._request("read", path, settings, facts, first))
        return torch.from_numpy(frames)

    def close(self) -> None:
        """End the child; a later request starts another one."""
        child, self._child = self._child, None
        if child is None:
            return
        self._connection.close()
        self._errors.close()
        if self._owner == os.getpid():  # after a fork, the child belongs to the parent process
            child.kill()
            with suppress(subprocess.TimeoutExpired):  # the child may wait for a dead network drive
                child.wait(timeout=5)

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        self._connection, theirs = Pipe()
        socket = theirs.fileno()
        try:
            with theirs:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "sgm.data.clips", str(os.getpid()), str(socket)],
                    cwd=_ROOT,
                    # NumPy does not need more threads; they would only use memory.
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    pass_fds=[socket],
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors,  # libraries may print errors to stdout too
                    stderr=self._errors,
                )
            self._receive(_START_SECONDS)
        except (EOFError, TimeoutError):
            raise UserError(
                f"the process that decodes clips does not start{self._last_words()}; "
                "check the installed packages against requirements.txt"
            ) from None

    def _request(self, call: str, path: Path, *arguments: object) -> object:
        """Send a request to the child and return the answer.

        Raises:
            ClipError: the child answers with this error, or does not answer.
            UserError: the child cannot be started.
        """
        if self._owner != os.getpid():
            self.close()
            self._owner, self._lock = os.getpid(), threading.Lock()
        request = (call, os.path.abspath(path), *arguments)
        answer: object = None
        with self._lock:
            for attempt in (1, 2):
                try:
                    if self._child is None:
                        self._start()
                    self._connection.send(request)
                    answer = self._receive(CLIP_SECONDS)
                    break
                except TimeoutError:
                    raise ClipError(f"decoding it took more than {CLIP_SECONDS:g} s") from None
                except (EOFError, ConnectionError):
                    # The child may have been killed from outside, or have ended with the thread
                    # that started it. So the clip is blamed only for a second crash.
                    if attempt == 2:
                        reason = f"it makes the decoder crash{self._last_words()}"
                        raise ClipError(reason) from None
                finally:
                    # After Ctrl-C too, or a later request would receive this request's answer.
                    if answer is None:
                        self.close()
        if isinstance(answer, ClipError):
            raise answer
        return answer

    def _receive(self, seconds: float) -> object:
        """Return the child's next answer.

        Raises:
            TimeoutError: there is no answer after this many `seconds`.
            EOFError: the child has ended.
        """
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
        except OSError:  # the child ended while it sent the answer, or before it read the request
            raise EOFError from None
        raise TimeoutError

    def _last_words(self) -> str:
        """Return the last line of the child's output in parentheses, or "" if it has no output."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        written = [line.strip() for line in lines if line.strip()]
        return f" ({written[-1]})" if written else ""


# The child process shared by all datasets of this process. The first request starts it.
OWN_CHILD = DecodingProcess()


def _probe_here(paths: Sequence[Path], settings: FrameSettings) -> list[ClipFacts | ClipError]:
    """Inspect clips for `probe_clips` in children of this process, several for many clips."""
    useful = 1 + len(paths) // _CLIPS_FOR_A_CHILD
    num_children = min(_MOST_CHILDREN, len(os.sched_getaffinity(0)), useful)
    # A child ends with the thread that started it, so OWN_CHILD is not used in these threads.
    idle: queue.SimpleQueue[DecodingProcess] = queue.SimpleQueue()

    def probe(path: Path) -> ClipFacts | ClipError:
        if os.path.exists(path) and not os.path.isfile(path):
            return ClipError("it is not a file")  # opening a named pipe would block forever
        child = idle.get()
        try:
            return child.probe(path, settings)
        except ClipError as reason:
            return reason
        finally:
            idle.put(child)

    results = []
    threads = ThreadPoolExecutor(num_children)
    with ExitStack() as at_end, Progress(len(paths), unit="clip") as progress:
        for _ in range(num_children):
            idle.put(at_end.enter_context(closing(DecodingProcess())))
        at_end.callback(threads.shutdown, wait=False, cancel_futures=True)
        for result in threads.map(probe, paths):
            results.append(result)
            progress.step("inspecting clips")
    return results


def probe_clips(paths: Sequence[Path], settings: FrameSettings) -> list[ClipFacts | ClipError]:
    """Return the properties of each clip, or the reason why it cannot be used.

    If several processes train together, all must make the same calls in the same order. The first
    process inspects the clips and sends the result to the others, so all use the same clips.

    Raises:
        UserError: clips cannot be decoded on this machine, or the processes see different clips.
    """
    found: tuple[list[Path], list[ClipFacts | ClipError]] | UserError = ([], [])
    with Ranks() as ranks:
        if ranks.rank == 0:
            try:
                found = (list(paths), _probe_here(paths, settings))
            except UserError as error:  # raised below, because the other processes wait for `found`
                found = error
        found = ranks.gather(found)[0]
    if isinstance(found, UserError):
        raise found
    first_paths, results = found
    if first_paths != list(paths):
        raise UserError(
            f"process {ranks.rank} does not find the same clips as the first process "
            f"({len(paths)} here, {len(first_paths)} there); all machines must see the same data "
            "folder"
        )
    return results
