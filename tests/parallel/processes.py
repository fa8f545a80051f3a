"""Runs a function in several processes of one group, as torchrun would."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sgm.cli import run_command

SECONDS = 300  # far more than any test needs, also on a busy machine

# Imported once, not by each process; no effect if another test has started the server already.
PRELOADED = [
    "sgm.engine",
    "sgm.models.autoencoder",
    "sgm.modules.encoders.modules",
    "sgm.parallel.processes",
    "torch._dynamo",
]


def run_ranks(
    work: Callable[..., int], world_size: int, *arguments: Any, log: Path
) -> list[int | None]:
    """Run ``work(rank, *arguments)`` in each process; return exit codes, None for one that hung.

    Their output goes to files whose names are `log` followed by the rank.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        processes.Process(target=_run, args=(work, rank, world_size, port, log, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def _run(
    work: Callable[..., int],
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    arguments: tuple[Any, ...],
) -> None:
    os.dup2(os.open(f"{log}{rank}", os.O_WRONLY | os.O_CREAT), 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost"} | {key: str(n) for key, n in numbers.items()}
    torch.set_num_threads(1)
    raise SystemExit(run_command(lambda: work(rank, *arguments)))
