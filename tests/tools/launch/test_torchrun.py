"""The launcher of several processes: what they say alike, and an end from outside."""

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
for said in ("to both", "to both", f"to {rank}"):
    logging.getLogger("any").warning("a warning %s", said)
pathlib.Path(__file__).with_name(f"rank-{rank}").touch()
while not all(pathlib.Path(__file__).with_name(f"rank-{other}").exists() for other in "01"):
    time.sleep(0.01)

def main():
    raise UserError("a mistake of both in \\udcff.mp4")

run_and_exit(main)
"""


def test_what_two_processes_say_alike_is_said_once(tmp_path, pytestconfig):
    notes, root = tmp_path / "notes", str(pytestconfig.rootpath)
    notes.mkdir()
    script = tmp_path / "talking.py"
    script.write_text(TALKING, encoding="utf-8")
    command = ["-m", "tools.launch.torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root, "TMPDIR": str(notes)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "a warning" in line or "mistake" in line]
    assert sorted(lines) == [
        "a warning to 0",
        "a warning to 1",
        *["a warning to both"] * 2,  # of one process, which may repeat itself
        "error: a mistake of both in \\udcff.mp4",
    ]
    assert list(notes.glob("said-by-rank-*")) == []


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
