"""The process that decodes clips for another: ``python -m sgm.data.decoding_child PARENT_PID``.

Requests are lines of JSON on standard input. An answer on standard output consists of `HEADER` with
two lengths, JSON of the first length, and bytes of the second. `sgm.data.decoding.DecodingProcess`
starts this process. It does not import torch, so it starts in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

HEADER = struct.Struct("<QQ")
# A damaged header can ask for frames of any size. The limit ends this process before the machine
# runs out of memory. Eight frames of 8K take 0.8 GB.
_MEMORY_BYTES = 4 << 30
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def _end_with_parent(parent: int) -> None:
    """Make the system kill this process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        sys.exit(0)


def _limit_memory() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _send(stream: BinaryIO, message: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    text = json.dumps(message).encode()
    stream.write(HEADER.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def main() -> None:
    """Answer requests until standard input ends."""
    _end_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    _limit_memory()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    from sgm.data.clips import probe, read_window
    from sgm.data.frames import ClipError, ClipFacts, FrameSettings

    _send(answers, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        call, path = request.pop("call"), request.pop("path")
        settings = FrameSettings(**request.pop("settings"))
        try:
            if call == "probe":
                _send(answers, dataclasses.asdict(probe(path, settings)))
            else:
                facts = ClipFacts(**request.pop("facts"))
                frames = read_window(path, settings, facts=facts, **request)
                _send(answers, {"shape": frames.shape}, frames.data.cast("B"))
        except ClipError as reason:
            _send(answers, {"reason": str(reason)})


if __name__ == "__main__":
    main()
