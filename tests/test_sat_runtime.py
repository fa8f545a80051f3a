"""SAT: what of it is imported, and its process groups; each in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORTS = {
    # What builds and runs the model.
    "from sgm.models.transformer import DiffusionTransformer": {"sat", "sat.model.base_model"},
    # A name of the package's own, by way of another package's.
    "from sat import AutoModel, training_main\nimport sat; assert not hasattr(sat, 'modle')": {
        "sat.model.official",
        "wandb",
        "deepspeed",
    },
    # One of the ready models first, and then what the package has of them.
    "from sat.model.official.gpt2_model import GPT2Model as first\n"
    "from sat.model import *; assert first is GPT2Model and BertModel": {"sat.model.official"},
    # A module of the package, and through it.
    "import sat; sat.model.base_model.BaseModel": {"sat.model.base_model"},
}
OPTIONAL = {"sat.model.official", "wandb", "datasets", "pandas", "transformers", "deepspeed"}


@pytest.mark.parametrize("statement", IMPORTS)
def test_only_what_is_asked_for_is_imported(statement, pytestconfig):
    found = subprocess.run(
        [sys.executable, "-c", f"import sgm\n{statement}\nimport sys; print(*sys.modules)"],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = set(found.stdout.split())
    expected = IMPORTS[statement]
    assert expected <= modules
    if not expected & OPTIONAL:
        assert not modules & OPTIONAL


def test_on_a_machine_with_a_gpu_deepspeed_is_left_out_too_and_can_be_imported_later(pytestconfig):
    statement = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "import sgm, sat.mpu, sys; assert 'deepspeed' not in sys.modules\n"
        "assert sat.mpu.checkpoint is torch.utils.checkpoint.checkpoint\n"
        "torch.cuda.is_available = lambda: False\n"
        "import deepspeed; assert deepspeed.initialize and sat.mpu.ColumnParallelLinear"
    )
    subprocess.run([sys.executable, "-c", statement], cwd=pytestconfig.rootpath, check=True)


def test_sat_takes_deepspeed_where_it_is_there_already(pytestconfig):
    statement = (
        "import deepspeed, torch; torch.cuda.is_available = lambda: True\n"
        "import sgm, sat.mpu; assert sat.mpu.checkpoint.__module__.startswith('deepspeed')"
    )
    subprocess.run([sys.executable, "-c", statement], cwd=pytestconfig.rootpath, check=True)


PROGRAM = """
import atexit, random, numpy, torch
from sgm.sat_runtime import ensure_process_groups
from sat import mpu

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
