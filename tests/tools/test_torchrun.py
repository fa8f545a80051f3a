"""The launcher of several processes when it is interrupted."""

import signal
import subprocess
import sys

import pytest

WAITING = "import os, time; os.write(1, b'there\\n'); time.sleep(60)"  # in one piece


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_an_end_from_outside_is_one_line(ended_by, tmp_path, pytestconfig):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING, encoding="utf-8")
    command = ["-m", "tools.torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
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
