"""Decoding in a process of its own, which may crash or hang without harm.

Damaged files can make the decoder abort the process that it runs in, or wait for ever. So clips
are opened in a child only. One that dies, or does not answer in time, is replaced, and the clip
that it was asked for is a `ClipError`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sgm.data.decoding_child import HEADER
from sgm.data.frames import ClipError, ClipFacts, FrameSettings
from sgm.distributed import Ranks
from sgm.errors import UserError
from sgm.progress import Progress

# What a clip may take until its frames are there, and a child until it has started.
CLIP_SECONDS = 60.0
_START_SECONDS = 120.0
_MOST_CHILDREN = 8
_CLIPS_FOR_A_CHILD = 32  # to look at fewer takes less time than to start another
_ROOT = Path(__file__).parents[2]


class DecodingProcess:
    """A child that decodes one clip at a time; started by the first request, and after each loss.

    May be used by several threads, and after a fork, where the new process gets a child of its
    own. The child ends with the process that started it, even if that one is killed.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self._errors: IO[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def probe(self, path: Path, settings: FrameSettings) -> ClipFacts:
        """What the clip holds, and how many frames it gives.

        Raises:
            ClipError: it cannot be used.
            UserError: clips cannot be decoded on this machine.
        """
        facts, _ = self._ask("probe", path, skip=settings.skip, fps=settings.fps)
        return ClipFacts(**facts)

    def read(
        self, path: Path, settings: FrameSettings, *, facts: ClipFacts, first: int, length: int
    ) -> Tensor:
        """`length` frames of the clip from the `first` on: uint8 (t, h, w, 3).

        Args:
            path: the clip.
            settings: as for `probe`.
            facts: what `probe` found.
            first: an index among the clip's frames at the rate of `settings`.
            length: number of frames.

        Raises:
            ClipError: they cannot be decoded, or the clip is another one now.
            UserError: clips cannot be decoded on this machine.
        """
        params = {"skip": settings.skip, "fps": settings.fps, "size": settings.video_size}
        params |= {"facts": dataclasses.asdict(facts), "first": first, "length": length}
        answer, payload = self._ask("read", path, **params)
        return torch.frombuffer(payload, dtype=torch.uint8).view(answer["shape"])  # (t, h, w, 3)

    def close(self) -> None:
        """End the child; a later request starts another."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for stream in (child.stdin, child.stdout, self._errors):
            stream.close()
        with suppress(subprocess.TimeoutExpired):  # it waits for a dead network drive
            child.wait(timeout=5)

    def _forget_parents_child(self) -> None:
        """After a fork: the child belongs to the parent, so only close what was copied."""
        if self._child is not None:
            for stream in (self._child.stdin, self._child.stdout, self._errors):
                stream.close()
        self.__init__()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "sgm.data.decoding_child", str(os.getpid())],
            cwd=_ROOT,
            # Threads of numpy's would only take memory.
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        try:
            self._receive(_START_SECONDS)
        except (EOFError, TimeoutError):
            raise UserError(
                f"the process that decodes clips does not start{self._last_words()}; "
                "check the installed packages against requirements.txt"
            ) from None

    def _ask(self, call: str, path: Path, **params: Any) -> tuple[dict[str, Any], bytearray]:
        if self._owner != os.getpid():
            self._forget_parents_child()
        request = {"call": call, "path": os.path.abspath(path), **params}
        with self._lock:
            try:
                answer, payload = self._try(request)
            except (EOFError, BrokenPipeError):
                # The child may have been ended from outside, or with the thread that started it.
                # A clip is to blame only if it happens again.
                answer, payload = self._try(request, again=True)
        if "reason" in answer:
            raise ClipError(answer["reason"])
        return answer, payload

    def _try(
        self, request: dict[str, Any], *, again: bool = False
    ) -> tuple[dict[str, Any], bytearray]:
        answered = False
        try:
            if self._child is None:
                self._start()
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            answer, payload = self._receive(CLIP_SECONDS)
            answered = True
            return answer, payload
        except TimeoutError:
            raise ClipError(f"decoding it took more than {CLIP_SECONDS:g} s") from None
        except (EOFError, BrokenPipeError):
            if not again:
                raise
            raise ClipError(f"it makes the decoder crash{self._last_words()}") from None
        finally:
            if not answered:  # Ctrl-C too: the answer must not be taken for the next one's
                self.close()

    def _receive(self, seconds: float) -> tuple[dict[str, Any], bytearray]:
        """The next answer; TimeoutError or EOFError where there is none."""
        deadline = time.monotonic() + seconds
        text_length, payload_length = HEADER.unpack(self._read(HEADER.size, deadline))
        answer = json.loads(self._read(text_length, deadline))
        return answer, self._read(payload_length, deadline)

    def _read(self, length: int, deadline: float) -> bytearray:
        content = bytearray(length)
        poll = select.poll()
        poll.register(self._child.stdout, select.POLLIN)
        position = 0
        while position < length:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = self._child.stdout.readinto(memoryview(content)[position:])
            if not part:
                raise EOFError
            position += part
        return content

    def _last_words(self) -> str:
        """The last line that the child wrote to its standard error, in brackets; or nothing."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        written = [line.strip() for line in lines if line.strip()]
        return f" ({written[-1]})" if written else ""


# The child of this process for all its datasets; it starts when a clip is asked for.
OWN_CHILD = DecodingProcess()


def _probe_here(paths: Sequence[Path], settings: FrameSettings) -> list[ClipFacts | ClipError]:
    """`probe_clips` in this process; many clips with several children."""
    useful = 1 + len(paths) // _CLIPS_FOR_A_CHILD
    num_children = min(_MOST_CHILDREN, len(os.sched_getaffinity(0)), useful)
    # A child ends with the thread that started it, so OWN_CHILD is not for the threads below.
    alone = num_children == 1
    children = [] if alone else [DecodingProcess() for _ in range(num_children)]
    idle: queue.SimpleQueue[DecodingProcess] = queue.SimpleQueue()
    for child in children or [OWN_CHILD]:
        idle.put(child)

    def probe(path: Path) -> ClipFacts | ClipError:
        if os.path.exists(path) and not os.path.isfile(path):
            return ClipError("it is no file")  # a pipe, from which one would wait for ever
        child = idle.get()
        try:
            return child.probe(path, settings)
        except ClipError as reason:
            return reason
        finally:
            idle.put(child)

    results = []
    threads = ThreadPoolExecutor(num_children)
    try:
        with Progress(len(paths), unit="clip") as progress:
            for result in map(probe, paths) if alone else threads.map(probe, paths):
                results.append(result)
                progress.step("looking at clips")
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.close()
        threads.shutdown()
    return results


def probe_clips(paths: Sequence[Path], settings: FrameSettings) -> list[ClipFacts | ClipError]:
    """For each clip what it holds, or why it cannot be used.

    Where processes train together, the first one looks at the clips and tells the others, so that
    all go on with the same ones; all must call this, in the same order.

    Raises:
        UserError: clips cannot be decoded on this machine, or processes see different clips.
    """
    found: Any = None
    with Ranks() as ranks:
        if ranks.rank == 0:
            try:
                found = (list(paths), _probe_here(paths, settings))
            except UserError as error:  # the others wait
                found = error
        found = ranks.gather(found)[0]
    if isinstance(found, UserError):
        raise found
    first_paths, results = found
    if first_paths != list(paths):
        raise UserError(
            f"process {ranks.rank} finds {len(paths)} clips with captions, the first "
            f"process {len(first_paths)}, or others; all machines must see the same data folder"
        )
    return results
