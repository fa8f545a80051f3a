"""Starting SAT's process groups in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import atexit, random, numpy, torch
from sat import mpu
from sgm.sat_runtime import ensure_process_groups

def state():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

# Runs after what is registered later.
atexit.register(lambda: print("left" if not torch.distributed.is_initialized() else "there"))
before = state()
ensure_process_groups()
ensure_process_groups()
assert state() == before, "the random generators were touched"
print(torch.distributed.get_world_size(), mpu.get_model_parallel_world_size())
"""


def test_one_process_needs_no_port_keeps_the_random_state_and_tidies_up() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with socket.socket() as taken:  # a port that another job holds
        taken.bind(("localhost", 0))
        taken.listen()
        environment["MASTER_ADDR"] = "localhost"
        environment["MASTER_PORT"] = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["1 1", "left"]
    assert "model parallel" not in done.stderr  # what SAT would report about its groups
