"""The launcher of several processes: their messages, and an end from outside."""

import os
import signal
import subprocess
import sys

import pytest

WAITING = "import os, time; os.write(1, b'there\\n'); time.sleep(60)"  # in one piece


TALKING = """
import logging, os, pathlib, time
from sgm.cli import run_and_exit, set_up_logging
from sgm.errors import UserError

rank = os.environ["RANK"]
set_up_logging()
for _ in range(2):
    logging.getLogger("sgm.loading").warning("a warning on both")
logging.getLogger("sgm.data.cache").warning("a warning on %s", rank)
logging.getLogger("my_model").warning("my warning on %s", rank)
pathlib.Path(__file__).with_name(f"rank-{rank}").touch()
while not all(pathlib.Path(__file__).with_name(f"rank-{other}").exists() for other in "01"):
    time.sleep(0.01)

def main():
    raise UserError("a mistake of both in \\udcff.mp4")

run_and_exit(main)
"""


def launch(script, pytestconfig):
    """Run a script in two processes; returns the finished process."""
    root = str(pytestconfig.rootpath)
    command = ["-m", "tools.launch.torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_two_processes_print_alike_is_printed_once(tmp_path, pytestconfig):
    script = tmp_path / "talking.py"
    script.write_text(TALKING, encoding="utf-8")
    run = launch(script, pytestconfig)
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "warning" in line or "mistake" in line]
    assert sorted(lines) == [
        "a warning on 0",
        "a warning on 1",
        *["a warning on both"] * 2,  # of one process, which may repeat itself
        "error: a mistake of both in \\udcff.mp4",
        "my warning on 0",
        "my warning on 1",
    ]


def test_a_mistake_of_one_process_is_printed_by_it(tmp_path, pytestconfig):
    script = tmp_path / "talking.py"
    alone = "if rank == '1':\n        raise UserError('a mistake of 1')\n    time.sleep(60)"
    mistake = TALKING.index("raise UserError")
    script.write_text(TALKING[:mistake] + alone + "\n\nrun_and_exit(main)\n", encoding="utf-8")
    run = launch(script, pytestconfig)
    assert run.returncode == 1
    assert run.stderr.endswith("error: a mistake of 1\n")


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_an_end_from_outside_is_one_line(ended_by, tmp_path, pytestconfig):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING, encoding="utf-8")
    command = ["-m", "tools.launch.torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=pytestconfig.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background has SIGINT ignored, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert [run.stdout.readline() for _ in range(2)] == ["there\n"] * 2
        run.send_signal(ended_by)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 128 + ended_by
    assert f"stopped by {ended_by.name}" in told
    assert "SignalException" not in told
