"""What every command does alike."""

import subprocess
import sys

import pytest

KINDS = {"0": ["news", "warning"], "1": ["warning"]}

LINES = '''
from sgm.cli import set_up_logging
set_up_logging()
speak = """
import logging
logging.info("news of %s", NAME)
logging.warning("warning of %s", NAME)
"""
for path in ("/home/me/sample_video.py", "/home/me/my_model.py", "/lib/site-packages/x.py"):
    exec(compile(speak, path, "exec"), {"NAME": path.rpartition("/")[2]})
'''


@pytest.mark.parametrize("rank", ["0", "1"])
def test_libraries_are_heard_from_warnings_on(
    rank: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    result = subprocess.run(
        [sys.executable, "-c", LINES],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=True,
    )
    ours = ("sample_video.py", "my_model.py")
    lines = [f"{kind} of {name}" for name in ours for kind in KINDS[rank]]
    assert result.stderr.splitlines() == [*lines, "warning of x.py"]
