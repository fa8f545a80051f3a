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
SCRIPTS = ["inference.sh", "finetune.sh", "tests/run.sh", ".ci/run", "tools/launch/launch.sh"]
TOOLS = ["__init__", "setup_env", "launch/__init__", "launch/choose_config"]

# Stands for sample_video.py and train_video.py: says what it was called with, and from where.
STUB = """import json, os, sys
print(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd()]))
sys.exit(7)
"""
# What the launchers read of the environment, kept from the tests.
LAUNCHING = {"NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"}
CONFIG_2B = "args: {load: weights/transformer}\n"
CONFIG_2B_SFT = "args: {load: weights/transformer, train_data: [my clips]}\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the launchers whose requirements the running Python meets."""
    root = tmp_path / "the repository"  # a blank in a path must not split it
    for name in [*SCRIPTS, *(f"tools/{name}.py" for name in TOOLS)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    (root / "sgm").symlink_to(REPOSITORY / "sgm")  # where choose_config has the paths from
    for name in ("requirements.in", "requirements.txt"):
        (root / name).write_text("# nothing\n")
    (root / "sample_video.py").write_text(STUB)
    (root / "train_video.py").write_text(STUB)
    (root / "tools" / "teach_tiny.py").write_text(STUB)
    (root / "configs").mkdir()
    (root / "configs" / "cogvideox_2b_infer.yaml").write_text(CONFIG_2B)
    (root / "configs" / "cogvideox_2b_sft.yaml").write_text(CONFIG_2B_SFT)
    return root


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHING}
    environment = kept | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | variables
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


def test_a_configuration_that_is_nowhere_is_missed_where_it_was_looked_for_first(copy, tmp_path):
    done = run([str(copy / "inference.sh"), "mine.yaml", "--fp16"], tmp_path)
    arguments = ["--base", str(tmp_path / "mine.yaml"), "--fp16"]
    assert json.loads(done.stdout) == ["sample_video.py", arguments, str(copy)]


@pytest.mark.parametrize("launcher", ["inference", "finetune"])
def test_help_is_of_the_launcher_first(copy, launcher):
    done = run([f"{launcher}.sh", "a.yaml", "--help", "--seed", "3"], copy)
    *own, called = done.stdout.splitlines()
    assert f"bash {launcher}.sh [CONFIG.yaml ...] [--FLAG ...]" in own[0]
    assert own[-1] == "Flags (this script sets --base):"
    script = {"inference": "sample_video.py", "finetune": "train_video.py"}[launcher]
    assert json.loads(called)[:2] == [script, ["--help"]]
    assert done.stderr == ""  # nothing is said of weights
    flags = ["--negative-prompt", "a sign that reads --help in red"]
    done = run([f"{launcher}.sh", "a.yaml", *flags], copy)
    assert json.loads(done.stdout)[1] == ["--base", "a.yaml", *flags]


def test_finetune_without_weights_or_data_teaches_the_bundled_model_and_says_why(copy, tmp_path):
    (copy / "weights" / "transformer").mkdir(parents=True)
    done = run([str(copy / "finetune.sh"), "--train-iters", "5"], tmp_path)
    assert json.loads(done.stdout) == ["teach_tiny.py", ["--train-iters", "5"], str(copy)]
    assert "my clips" in done.stderr and done.stderr.count("\n") == 1


def test_finetune_without_weights_takes_the_data_that_is_given(copy):
    (copy / "mine").mkdir()
    done = run(["finetune.sh", "--train-data", "mine"], copy)
    arguments = ["--base", "configs/cogvideox_tiny_sft.yaml", "--train-data", "mine"]
    assert json.loads(done.stdout) == ["train_video.py", arguments, str(copy)]


@pytest.mark.parametrize("script", ["inference.sh", "finetune.sh"])
def test_a_path_given_that_does_not_exist_is_one_sentence(copy, script):
    done = run([script, "--load", "absent"], copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --load absent does not exist; check the path\n"


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


def launched(copy: Path, script: str, *flags: str, gpus: int = 0, **variables: str) -> list[str]:
    """The command that run_script would run, on a machine with so many GPUs."""
    programs = copy / "bin"
    programs.mkdir(exist_ok=True)
    smi = programs / "nvidia-smi"
    # As on a machine with a GPU cut in parts, whose lines are indented.
    lines = [f"GPU {i}: NVIDIA H100 (UUID: GPU-1{i})\n  MIG 1g.10gb (UUID: m)" for i in range(gpus)]
    smi.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines or ["No devices found"]) + "\nEND\n")
    smi.chmod(0o755)
    hidden = "" if "CUDA_VISIBLE_DEVICES" in variables else "unset CUDA_VISIBLE_DEVICES; "
    source = f"{hidden}source tools/launch/launch.sh; python=echo"
    shell = f'{source}; split_arguments "$@"; run_script {script}'
    path = f"{programs}:{os.environ['PATH']}"
    done = run(
        ["-c", f"set -euo pipefail; {shell}", "bash", "a.yaml", *flags],
        copy,
        PATH=path,
        **variables,
    )
    assert done.stderr == "", done.stderr
    return done.stdout.split()


def torchrun(processes: int, *meeting: str) -> list[str]:
    meeting = meeting or ("--standalone",)
    return ["-m", "tools.launch.torchrun", *meeting, "--nproc-per-node", str(processes)]


def test_nproc_starts_torchrun(copy):
    command = ["sample_video.py", "--base", "a.yaml", "--fp16"]
    assert launched(copy, "sample_video.py", "--fp16", NPROC="2") == torchrun(2) + command


@pytest.mark.parametrize(
    ("gpus", "visible", "processes"),
    [
        *((0, None, 1), (1, None, 1), (4, None, 4)),
        *((4, "1,3", 2), (4, "GPU-10,GPU-11,-1,0", 2), (4, "", 1), (4, "-1", 1), (0, "0,1", 1)),
    ],
)
def test_training_takes_all_visible_gpus(copy, gpus, visible, processes):
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = ["train_video.py", "--base", "a.yaml"]
    expected = command if processes == 1 else torchrun(processes) + command
    assert launched(copy, "train_video.py", gpus=gpus, **variables) == expected


def test_nproc_and_the_cpu_overrule_the_number_of_gpus(copy):
    command = ["train_video.py", "--base", "a.yaml"]
    assert launched(copy, "train_video.py", gpus=4, NPROC="1") == command
    assert launched(copy, "train_video.py", gpus=2, NPROC="4") == torchrun(4) + command
    flags = ["--device", "cpu"]
    assert launched(copy, "train_video.py", *flags, NPROC="2") == torchrun(2) + command + flags


@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--device=cpu"]])
def test_training_on_the_cpu_runs_in_one_process(copy, flags):
    command = ["train_video.py", "--base", "a.yaml"]
    assert launched(copy, "train_video.py", *flags, gpus=4) == command + flags


def test_sampling_runs_in_one_process_however_many_gpus_there_are(copy):
    assert launched(copy, "sample_video.py", gpus=4) == ["sample_video.py", "--base", "a.yaml"]


def test_several_machines_meet_at_the_master(copy):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    meeting = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port"]
    command = ["train_video.py", "--base", "a.yaml"]
    expected = torchrun(1, *meeting, "29500") + command
    assert launched(copy, "train_video.py", gpus=1, **nodes) == expected
    expected = torchrun(8, *meeting, "1234") + command
    assert launched(copy, "train_video.py", gpus=8, MASTER_PORT="1234", **nodes) == expected
    alone = {"NNODES": "1", "MASTER_ADDR": "10.0.0.1"}
    assert launched(copy, "train_video.py", gpus=2, **alone) == torchrun(2) + command


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        *(
            ({"NPROC": number}, f"NPROC={number} is invalid; ")
            for number in ("0", "two", "-1", "1.5", "08")
        ),
        ({"NNODES": "1:2"}, "NNODES=1:2 is invalid; it must be a whole number of at"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2, but MASTER_ADDR is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "h"}, "NNODES=2, but NODE_RANK is not set"),
        (
            {"NNODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "2"},
            "NODE_RANK=2 is too large; with NNODES=2 it must be below 2",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "0", "MASTER_PORT": "x"},
            "MASTER_PORT=x is invalid; it must be",
        ),
    ],
)
def test_a_wrong_number_of_processes_or_machines_is_one_sentence(copy, variables, words):
    done = run(["finetune.sh", "a.yaml"], copy, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["old", "absent"])
def test_an_old_or_absent_python_is_one_sentence(copy, tmp_path, name):
    python = tmp_path / name
    if name == "old":
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
    done = run(["inference.sh"], copy, PYTHON=str(python))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {python} is not Python 3.10")
    assert done.stderr.count("\n") == 1


def test_a_failed_set_up_ends_the_launcher(copy):
    (copy / "requirements.in").write_text("absent-package==1.0  # why\n")
    (copy / ".venv").write_text("a file in the place of the folder\n")
    done = run(["inference.sh"], copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {copy}/.venv does not meet requirements.in")
    assert "Traceback" not in done.stderr
