"""torchrun, where what a failing process says is the last word, once, and without a stack trace.

python -m tools.launch.torchrun --standalone --nproc-per-node 2 sample_video.py …
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from sgm.one_voice import one_voice


def run() -> int:
    """Start the processes that the command line asks for; the exit code of the first to fail."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with one_voice():
            main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was ended by {name}; see its last lines", file=sys.stderr)
        return 1
    except SignalException as stop:  # Ctrl-C, or a scheduler's end
        print(f"stopped by {signal.Signals(stop.sigval).name}", file=sys.stderr)
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(run())
