"""What every command does alike."""

import importlib.util
import os
import subprocess
import sys

import pytest

from sgm.cli import LOGGERS_OF_ONE_RANK, run_command

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


ENDING = """
from sgm.cli import run_and_exit
import atexit

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
kept.itself = kept  # which only the garbage collector would take apart
atexit.register(print, "at the end")

def main():
    print("done")
    return 3

run_and_exit(main)
"""


@pytest.fixture
def buffered(monkeypatch):
    """Commands write when a buffer is full or at their end, and not at once."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.mark.usefixtures("buffered")
def test_a_command_ends_as_registered_and_without_taking_all_apart(pytestconfig):
    command = [sys.executable, "-c", ENDING]
    ended = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done\nat the end\n", "")


@pytest.mark.usefixtures("buffered")
def test_a_command_whose_reader_has_left_ends_in_silence(pytestconfig):
    with subprocess.Popen(
        [sys.executable, "-c", ENDING],
        cwd=pytestconfig.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as ended:
        ended.stdout.close()
        assert (ended.wait(60), ended.stderr.read()) == (3, b"")


def test_the_loggers_of_one_rank_exist():
    assert [name for name in LOGGERS_OF_ONE_RANK if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_warning_that_cannot_be_put_together_stops_nothing(rank, pytestconfig):
    speak = """
from sgm.cli import set_up_logging
set_up_logging()
import logging
logging.warning("no place for it", 1)
logging.warning("the next")
"""
    ended = subprocess.run(
        [sys.executable, "-c", speak],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"RANK": rank},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0
    assert "Logging error" in ended.stderr and ended.stderr.endswith("the next\n")


def test_a_package_that_is_not_installed_is_one_sentence(capsys):
    def main():
        import package_that_nobody_has.part  # noqa: F401

    assert run_command(main) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sys.executable} has no package 'package_that_nobody_has'")
    assert "pip install -r requirements.txt" in said and said.count("\n") == 1


def test_a_package_of_another_version_is_told_from_one_that_is_absent(capsys):
    def main():
        import omegaconf.part_that_it_lacks  # noqa: F401

    assert run_command(main) == 1
    assert "is a version without omegaconf.part_that_it_lacks; install" in capsys.readouterr().err


def test_a_module_that_this_code_lacks_is_its_own_fault():
    def main():
        import sgm.module_that_nobody_wrote  # noqa: F401

    with pytest.raises(ModuleNotFoundError):
        run_command(main)
