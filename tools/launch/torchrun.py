"""Run torchrun without its stack trace, so that the failed process's error is the last line.

python -m tools.launch.torchrun --standalone --nproc-per-node 2 sample_video.py …
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    """Start the processes of the command line and return the exit code of the first that fails.

    If a signal killed that process, return 1. If a signal stopped this command, return 128 plus the
    number of the signal.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # the process has printed its error
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was killed by {name}; see its output above", file=sys.stderr)
        return 1
    except SignalException as stop:  # Ctrl-C, or a scheduler that ends the job
        print(f"stopped by {signal.Signals(stop.sigval).name}", file=sys.stderr)
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(run())
