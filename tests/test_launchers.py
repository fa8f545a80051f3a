"""inference.sh, finetune.sh and the like in a small copy of the repository, with stub programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ["inference.sh", "finetune.sh", "tests/run.sh", ".ci/run", "tools/launch.sh"]
TOOLS = ["__init__", "setup_env", "check_requirements", "choose_config"]

# Stands for sample_video.py and train_video.py: says what it was called with, and from where.
STUB = """import json, os, sys
print(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd()]))
sys.exit(7)
"""
CONFIG_2B = "args: {load: weights/transformer}\n"
CONFIG_2B_SFT = "args: {load: weights/transformer, train_data: [my clips]}\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the launchers whose requirements the running Python meets."""
    root = tmp_path / "the repository"  # a blank in a path must not split it
    for name in [*SCRIPTS, *(f"tools/{name}.py" for name in TOOLS)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    (root / "requirements.txt").write_text("# nothing\n")
    (root / "sample_video.py").write_text(STUB)
    (root / "train_video.py").write_text(STUB)
    (root / "configs").mkdir()
    (root / "configs" / "cogvideox_2b_infer.yaml").write_text(CONFIG_2B)
    (root / "configs" / "cogvideox_2b_sft.yaml").write_text(CONFIG_2B_SFT)
    return root


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment = kept | {"PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", *command], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shell_scripts_have_no_syntax_error(script):
    assert run(["-n", script], REPOSITORY).stderr == ""


def test_without_weights_the_bundled_model_runs_and_the_missing_path_is_said(copy):
    done = run(["inference.sh", "--seed", "3", "--output-dir", "a b"], copy)
    arguments = [
        "--base",
        "configs/cogvideox_tiny_infer.yaml",
        "--seed",
        "3",
        "--output-dir",
        "a b",
    ]
    assert json.loads(done.stdout) == ["sample_video.py", arguments, str(copy)]
    assert done.returncode == 7  # that of the program
    assert "weights/transformer" in done.stderr and done.stderr.count("\n") == 1


def test_with_its_weights_the_2b_model_runs_without_a_word(copy):
    (copy / "weights" / "transformer").mkdir(parents=True)
    done = run(["inference.sh"], copy)
    assert json.loads(done.stdout)[1] == ["--base", "configs/cogvideox_2b_infer.yaml"]
    assert done.stderr == ""


def test_a_configuration_named_explicitly_never_falls_back(copy):
    done = run(["inference.sh", "configs/cogvideox_2b_infer.yaml", "more.yaml", "--fp16"], copy)
    arguments = ["--base", "configs/cogvideox_2b_infer.yaml", "more.yaml", "--fp16"]
    assert json.loads(done.stdout)[1] == arguments
    assert done.stderr == ""


def test_a_base_flag_before_the_configurations_may_stand(copy):
    done = run(["inference.sh", "--base", "a.yaml", "--fp16"], copy)
    assert json.loads(done.stdout)[1] == ["--base", "a.yaml", "--fp16"]
    done = run(["inference.sh", "--fp16", "--base", "a.yaml"], copy)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_configurations_are_found_from_another_folder(copy, tmp_path):
    (tmp_path / "mine.yaml").touch()
    done = run(
        [str(copy / "inference.sh"), "mine.yaml", "configs/cogvideox_2b_infer.yaml"], tmp_path
    )
    arguments = ["--base", str(tmp_path / "mine.yaml"), "configs/cogvideox_2b_infer.yaml"]
    assert json.loads(done.stdout) == ["sample_video.py", arguments, str(copy)]


def test_finetune_without_weights_or_data_trains_the_bundled_model_and_says_why(copy):
    (copy / "weights" / "transformer").mkdir(parents=True)
    done = run(["finetune.sh", "--train-iters", "5"], copy)
    arguments = ["--base", "configs/cogvideox_tiny_sft.yaml", "--train-iters", "5"]
    assert json.loads(done.stdout) == ["train_video.py", arguments, str(copy)]
    assert "my clips" in done.stderr and done.stderr.count("\n") == 1


def test_finetune_with_weights_and_data_trains_the_2b_model_from_any_folder(copy, tmp_path):
    (copy / "weights" / "transformer").mkdir(parents=True)
    (copy / "my clips").mkdir()
    done = run([str(copy / "finetune.sh")], tmp_path)
    arguments = ["--base", "configs/cogvideox_2b_sft.yaml"]
    assert json.loads(done.stdout) == ["train_video.py", arguments, str(copy)]
    assert done.stderr == ""


def test_finetune_trains_what_it_is_told_to(copy):
    done = run(["finetune.sh", "a.yaml", "b.yaml"], copy)
    assert json.loads(done.stdout)[1] == ["--base", "a.yaml", "b.yaml"]
    assert done.stderr == ""


def test_nproc_starts_torchrun(copy):
    script = 'source tools/launch.sh; python=echo; split_arguments "$@"; run_script sample_video.py'
    done = run(["-c", script, "bash", "a.yaml", "--fp16"], copy, NPROC="2")
    assert done.stdout.split() == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("sample_video.py", "--base", "a.yaml", "--fp16"),
    ]


@pytest.mark.parametrize("number", ["0", "two", "-1", "1.5"])
def test_a_wrong_nproc_is_one_sentence(copy, number):
    done = run(["inference.sh", "a.yaml"], copy, NPROC=number)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: NPROC={number}") and done.stderr.count("\n") == 1


def test_an_old_or_absent_python_is_one_sentence(copy, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), str(tmp_path / "nothing")):
        done = run(["inference.sh"], copy, PYTHON=python)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {python} is not a Python of version 3.10")
        assert done.stderr.count("\n") == 1


def test_a_failed_set_up_ends_the_launcher(copy):
    (copy / "requirements.txt").write_text("absent-package==1.0  # why\n")
    (copy / ".venv").write_text("a file in the place of the folder\n")
    done = run(["inference.sh"], copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: the set-up of ")
    assert "Traceback" not in done.stderr
