"""The making of .venv, with programs in the place of python and pip that are quick and can fail."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from tools import setup_env
from tools.setup_env import Environment, choose_python

# Makes an environment whose python notes each pip call in pip.log beside the environment and then
# does what pip.sh there says, if it is there.
FAKE_PYTHON = """#!/bin/sh
# called as: python -m venv FOLDER
mkdir -p "$3/bin" && touch "$3/pyvenv.cfg"
cat > "$3/bin/python" <<'END'
#!/bin/sh
cd "$(dirname "$0")/../.."
echo "$*" >> pip.log
if [ -e pip.sh ]; then . ./pip.sh; fi
END
chmod +x "$3/bin/python"
"""


class Repository:
    """A folder with requirements that the running Python does not meet."""

    def __init__(self, root: Path) -> None:
        self.venv = root / ".venv"
        self.python = str(self.venv / "bin" / "python")
        self.main = root / "requirements.txt"
        self.dev = root / "requirements-dev.txt"
        self.pip = root / "pip.sh"
        self.main.write_text("absent-one==1.0  # why\n")
        self.dev.write_text("-r requirements.txt\nabsent-two==1.0  # why\n")

    def installs(self) -> list[str]:
        """Names of the requirements files that pip was called with, in order."""
        log = self.venv.with_name("pip.log")
        lines = log.read_text().splitlines() if log.exists() else []
        return [Path(line.split()[-1]).name for line in lines]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    base = tmp_path / "base-python"
    base.write_text(FAKE_PYTHON)
    base.chmod(0o755)
    monkeypatch.setattr(setup_env, "_base_python", lambda: str(base))
    return Repository(tmp_path)


def failure(repository: Repository) -> str:
    with pytest.raises(SystemExit) as caught:
        choose_python(repository.main, repository.venv)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def test_a_python_that_meets_the_requirements_is_used_as_it_is(repository, capsys):
    repository.main.write_text("pytest==1.0  # >=1: met by the one that runs this\n")
    assert choose_python(repository.main, repository.venv) == sys.executable
    assert not repository.venv.exists()
    assert capsys.readouterr() == ("", "")


def test_the_environment_is_made_once(repository, capsys):
    assert choose_python(repository.main, repository.venv) == repository.python
    said = capsys.readouterr()
    assert said.out == ""
    assert "absent-one (absent)" in said.err and said.err.count("\n") == 2
    assert choose_python(repository.main, repository.venv) == repository.python
    assert capsys.readouterr().err == ""
    assert repository.installs() == ["requirements.txt"]


def test_it_is_remade_for_other_pins_and_not_for_another_comment(repository):
    choose_python(repository.main, repository.venv)
    (repository.venv / "old").mkdir()
    repository.main.write_text("# new\nabsent-one==1.0  # >=0.5: another reason\n")
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt"]
    repository.main.write_text("absent-one==1.1  # why\n")
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt"] * 2
    assert not (repository.venv / "old").exists()


def test_a_file_that_needs_more_completes_it(repository):
    choose_python(repository.main, repository.venv)
    (repository.venv / "kept").mkdir()
    choose_python(repository.dev, repository.venv)
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt", "requirements-dev.txt"]
    assert (repository.venv / "kept").exists()


def test_the_file_of_all_stands_for_those_that_it_includes(repository):
    choose_python(repository.dev, repository.venv)
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements-dev.txt"]


def test_it_is_remade_when_its_interpreter_is_gone(repository):
    choose_python(repository.main, repository.venv)
    Path(repository.python).unlink()
    Path(repository.python).symlink_to("/nonexistent/python3")
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt"] * 2


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("ERROR: first\\nERROR: No matching distribution found for absent-one==1.0", "No matching"),
        ("WARNING: Retrying after NewConnectionError\\nERROR: No matching", "no package index"),
        ("Killed", "Killed"),
    ],
)
def test_a_failed_set_up_is_one_sentence_and_starts_anew(repository, output, part):
    repository.pip.write_text(f"printf '{output}\\n' >&2; exit 1\n")
    message = failure(repository)
    assert message.startswith("error: ") and part in message
    assert str(repository.venv / "setup.log") in message
    assert not Environment(repository.venv).has(repository.main)
    (repository.venv / "half").mkdir()
    repository.pip.unlink()
    assert choose_python(repository.main, repository.venv) == repository.python
    assert not (repository.venv / "half").exists()


def test_two_runs_at_once_install_once(repository, capsys):
    repository.pip.write_text("sleep 0.5\n")
    chosen: list[str] = []

    def run() -> None:
        chosen.append(choose_python(repository.main, repository.venv))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [repository.python] * 2
    assert repository.installs() == ["requirements.txt"]
    assert "waiting" in capsys.readouterr().err


def test_an_environment_of_somebody_else_is_used_if_it_fits_and_never_changed(repository):
    python = Path(repository.python)
    python.parent.mkdir(parents=True)
    (repository.venv / "pyvenv.cfg").touch()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    assert choose_python(repository.main, repository.venv) == repository.python
    python.write_text("#!/bin/sh\nexit 1\n")
    assert "was not made by this set-up" in failure(repository)
    assert sorted(path.name for path in repository.venv.iterdir()) == ["bin", "pyvenv.cfg"]


def test_a_python_without_venv_says_what_to_install(repository, monkeypatch):
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None)
    assert "apt-get install python3-venv" in failure(repository)
    assert not repository.venv.exists()
