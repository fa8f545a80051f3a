"""torchrun without its own stack trace: the error of the process that fails is the last line.

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
    """Start the processes of the command line; returns the exit code of the first that fails.

    Returns 1 if a signal ended that process, and 128 plus its number if a signal ended this one.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has printed its error
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was ended by {name}; see its last lines", file=sys.stderr)
        return 1
    except SignalException as stop:  # Ctrl-C, or a scheduler that ends the job
        print(f"stopped by {signal.Signals(stop.sigval).name}", file=sys.stderr)
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(run())
