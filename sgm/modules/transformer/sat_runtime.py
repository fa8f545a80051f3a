"""What SwissArmyTransformer (SAT) wants of the process before it builds a layer."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sat import mpu


def ensure_process_groups() -> None:
    """Create the process groups that SAT's layers ask for their size, unless they exist.

    A training run has made them already, and nothing happens. A process on its own gets a group
    of one, whose store lives in its memory: it takes no port and meets no other job. Under torchrun
    (``WORLD_SIZE`` above 1) the ranks meet at the address that torchrun gives them; every rank
    holds the whole model. GPU tensors go through NCCL: gloo would take each by way of the host,
    even with nobody to send it to. Unlike SAT's own start-up for single models, this
    leaves the random generators alone.
    """
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            torch.distributed.init_process_group(backend)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            leave_process_groups_at_exit()
    if not mpu.model_parallel_is_initialized():
        with quiet_sat():
            mpu.initialize_model_parallel(1)


def leave_process_groups_at_exit() -> None:
    """Have the process groups taken down at exit; NCCL warns of a process that ends without.

    A process on its own has called this with its groups; again does no harm. One of several is to
    call it when its work is done, so not after a failure: NCCL would wait for what the others no
    longer take part in.
    """
    atexit.register(_leave_process_groups)


def _leave_process_groups() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_sat() -> Iterator[None]:
    """Hold back what SAT reports below an error.

    That is a line for every layer it changes, and warnings about optional packages at import.
    """
    sat_logger = logging.getLogger("sat")
    level = sat_logger.level
    sat_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sat_logger.setLevel(level)
