"""What every command does alike."""

import subprocess
import sys

import pytest

LINES = """
import logging
from sgm.cli import set_up_logging
set_up_logging()
for name in ("sgm.models", "__main__", "datasets.config"):
    logging.getLogger(name).info("news of %s", name)
    logging.getLogger(name).warning("warning of %s", name)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_libraries_are_heard_from_warnings_on(rank, pytestconfig, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    result = subprocess.run(
        [sys.executable, "-c", LINES],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=True,
    )
    news = [f"{kind} of {name}" for name in ("sgm.models", "__main__") for kind in KINDS[rank]]
    assert result.stderr.splitlines() == [*news, "warning of datasets.config"]


KINDS = {"0": ["news", "warning"], "1": ["warning"]}
