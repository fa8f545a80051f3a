"""SAT's packages without the parts that nobody asked for, which they still have for who asks."""

import subprocess
import sys

import pytest

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
