"""The choice of a Python and the making of .venv, with fast programs in place of python and pip."""

from __future__ import annotations

import ast
import sys
import threading
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools import setup_env
from tools.setup_env import Environment, choose_python, requirement_lines, unmet_requirements

REPOSITORY = Path(setup_env.__file__).parents[1]

# Makes an environment whose python notes each pip call in pip.log beside the environment and then
# does what pip.sh there says, if it is there.
FAKE_PYTHON = """#!/bin/sh
# called as: python -m venv --clear FOLDER
rm -rf "$4"
mkdir -p "$4/bin" && touch "$4/pyvenv.cfg"
cat > "$4/bin/python" <<'END'
#!/bin/sh
cd "$(dirname "$0")/../.."
echo "$*" >> pip.log
if [ -e pip.sh ]; then . ./pip.sh; fi
END
chmod +x "$4/bin/python"
"""


class Repository:
    """A folder with requirements that the running Python does not meet."""

    def __init__(self, root: Path) -> None:
        self.venv = root / ".venv"
        self.python = str(self.venv / "bin" / "python")
        self.main = root / "requirements.txt"
        self.dev = root / "requirements-dev.txt"
        self.pip = root / "pip.sh"
        self.main.write_text("absent-one==1.0\n")
        self.dev.write_text("-r requirements.txt\nabsent-two==1.0\n")
        self.ranges = root / "requirements.in"
        self.ranges.write_text("absent-one>=1  # why\n")
        self.dev.with_suffix(".in").write_text("-r requirements.in\nabsent-two>=1  # why\n")

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
    monkeypatch.setattr(sys, "executable", str(base))
    return Repository(tmp_path)


def failure(repository: Repository) -> str:
    """The sentence with which the set-up ends."""
    with pytest.raises(SystemExit) as caught:
        choose_python(repository.main, repository.venv)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def test_a_python_that_meets_the_ranges_is_used_as_it_is(repository, capfd):
    repository.ranges.write_text("pytest>=1  # met by the Python that runs this\n")
    assert choose_python(repository.main, repository.venv) == sys.executable
    assert sorted(repository.venv.parent.glob(".venv*")) == []
    assert capfd.readouterr() == ("", "")


def test_the_environment_is_made_once(repository, capfd):
    assert choose_python(repository.main, repository.venv) == repository.python
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "absent-one>=1 (missing)" in printed.err and printed.err.count("\n") == 2
    assert choose_python(repository.main, repository.venv) == repository.python
    assert capfd.readouterr().err == ""
    assert repository.installs() == ["requirements.txt"]


def test_other_pins_are_installed_into_it(repository):
    choose_python(repository.main, repository.venv)
    (repository.venv / "kept").mkdir()
    repository.main.write_text("absent-one==1.1\n")
    choose_python(repository.main, repository.venv)
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt"] * 2
    assert (repository.venv / "kept").exists()


def test_a_file_that_needs_more_completes_it(repository):
    choose_python(repository.main, repository.venv)
    (repository.venv / "kept").mkdir()
    choose_python(repository.dev, repository.venv)
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt", "requirements-dev.txt"]
    assert (repository.venv / "kept").exists()


def test_installing_a_file_installs_those_that_it_includes(repository):
    choose_python(repository.dev, repository.venv)
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements-dev.txt"]


def test_it_is_remade_when_its_interpreter_is_gone(repository):
    choose_python(repository.main, repository.venv)
    (repository.venv / "old").mkdir()
    Path(repository.python).unlink()
    Path(repository.python).symlink_to("/nonexistent/python3")
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt"] * 2
    assert not (repository.venv / "old").exists()


def test_it_is_remade_for_another_version_of_python(repository, monkeypatch):
    choose_python(repository.main, repository.venv)
    (repository.venv / "old").mkdir()
    monkeypatch.setattr(setup_env, "_PYTHON", "3.99")
    choose_python(repository.main, repository.venv)
    assert repository.installs() == ["requirements.txt"] * 2
    assert not (repository.venv / "old").exists()


@pytest.mark.parametrize("ended_by", ["exit 1", "kill -9 $$"])
def test_a_failed_set_up_is_one_sentence_and_starts_anew(repository, capfd, ended_by):
    repository.pip.write_text(f"echo 'ERROR: No matching distribution' >&2; {ended_by}\n")
    message = failure(repository)
    assert message.startswith("error: pip failed to install requirements.txt")
    assert "PIP_INDEX_URL" in message
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.endswith("ERROR: No matching distribution\n")
    assert not Environment(repository.venv).has(repository.main)
    (repository.venv / "half").mkdir()
    repository.pip.unlink()
    assert choose_python(repository.main, repository.venv) == repository.python
    assert not (repository.venv / "half").exists()


def test_an_interrupted_addition_starts_anew(repository):
    choose_python(repository.main, repository.venv)
    (repository.venv / "half").mkdir()
    repository.pip.write_text("exit 1\n")
    with pytest.raises(SystemExit):
        choose_python(repository.dev, repository.venv)
    repository.pip.unlink()
    choose_python(repository.main, repository.venv)
    assert not (repository.venv / "half").exists()


def test_two_runs_at_once_install_once(repository, capfd):
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
    assert "waiting" in capfd.readouterr().err


def make_by_hand(venv: Path, *, exit_code: int) -> Path:
    """An environment that a user made; its Python meets the ranges if `exit_code` is 0."""
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    (venv / "pyvenv.cfg").touch()
    python.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    python.chmod(0o755)
    return python


def test_an_environment_of_the_user_is_used_if_it_fits_and_never_changed(repository):
    make_by_hand(repository.venv, exit_code=0)
    assert choose_python(repository.main, repository.venv) == repository.python
    make_by_hand(repository.venv, exit_code=1)
    assert "was not made by this set-up" in failure(repository)
    assert sorted(path.name for path in repository.venv.iterdir()) == ["bin", "pyvenv.cfg"]


def test_a_link_is_used_if_it_fits_and_never_emptied(repository, tmp_path):
    make_by_hand(tmp_path / "elsewhere", exit_code=0)
    repository.venv.symlink_to(tmp_path / "elsewhere")
    assert choose_python(repository.main, repository.venv) == repository.python
    repository.venv.with_name(".venv.lock").write_text("an earlier set-up was interrupted\n")
    make_by_hand(repository.venv, exit_code=1)
    assert "was not made by this set-up" in failure(repository)
    assert sorted(path.name for path in repository.venv.iterdir()) == ["bin", "pyvenv.cfg"]


def test_a_python_is_asked_for_its_own_packages(repository, monkeypatch):
    environment = Environment(repository.venv)
    environment.python = Path(sys.prefix) / "bin" / "python"
    assert not environment.meets(repository.ranges)
    repository.ranges.write_text("pytest>=1\n")
    assert environment.meets(repository.ranges)


def test_a_python_without_venv_prints_what_to_install(repository):
    Path(sys.executable).write_text("#!/bin/sh\nexit 1\n")
    assert "apt-get install python3-venv" in failure(repository)


@pytest.mark.parametrize(
    ("accepts", "version", "is_met"),
    [
        (">=2.11,<3", "2.11.0+cu130", True),
        (">=2.11,<3", "2.13.0", True),
        (">=2.11,<3", "2.9.1", False),  # numbers, not letters: 9 < 11
        (">=2.11,<3", "3.0", False),
        (">=2.11,<3", "2.11.0a0+5228986", True),  # NVIDIA's containers name their builds so
        ("==0.4.12", "0.4.12", True),
        ("==0.4.12", "0.4.13", False),
        ("==2.0", "2", True),
        (">=1", "", False),
    ],
)
def test_versions_in_and_out_of_a_range(tmp_path, monkeypatch, accepts, version, is_met):
    monkeypatch.setattr(setup_env.metadata, "version", lambda name: version or None)
    (tmp_path / "some.in").write_text(f"demo{accepts}  # why\n")
    assert (unmet_requirements(tmp_path / "some.in") == []) is is_met


def test_unmet_requirements_are_named_with_what_is_installed(tmp_path, monkeypatch):
    for name in ("demo_one-1.5+cpu", "Demo.Two-2.0"):
        folder = tmp_path / "site" / f"{name}.dist-info"
        folder.mkdir(parents=True)
        name, version = name.split("-")
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "base.in").write_text("demo-one>=1.4,<2  # in its range\n")
    (tmp_path / "dev.in").write_text(
        "# a comment\n-r base.in\n\n"
        "demo-two==2.1  # another version\n"
        "demo-three>=1  # missing\n"
        'demo-four>=1; python_version < "3"  # not for this Python\n'
    )
    assert unmet_requirements(tmp_path / "base.in") == []
    assert unmet_requirements(tmp_path / "dev.in") == [
        "demo-two==2.1 (installed: 2.0)",
        "demo-three>=1 (missing)",
    ]


def test_a_python_without_packaging_meets_nothing(repository, monkeypatch):
    repository.ranges.write_text("pytest>=1\n")
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert unmet_requirements(repository.ranges) == ["packaging (missing)"]


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_the_pins_lie_in_the_ranges(name):
    """Both files name the same packages, each range with a reason, each pin exact."""
    ranges = {r.name: r for r in map(Requirement, requirement_lines(REPOSITORY / f"{name}.in"))}
    pins = list(map(Requirement, requirement_lines(REPOSITORY / f"{name}.txt")))
    assert len(ranges) > 10
    assert {pin.name for pin in pins} == ranges.keys()
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==" and Version(exact.version) in ranges[pin.name].specifier
    for line in (REPOSITORY / f"{name}.in").read_text(encoding="utf-8").splitlines():
        assert not line or line.startswith(("#", "-r")) or "  # " in line


# Packages, in lower case, whose modules have another name.
PACKAGES = {"PIL": "pillow", "sat": "swissarmytransformer", "yaml": "pyyaml"}
# Packages that only other packages import; requirements.in says which.
INDIRECT = {"setuptools"}


def imported_names() -> set[str]:
    """Top-level names that the product's own files import from outside it."""
    tops = [path for path in REPOSITORY.iterdir() if path.name[0] != "." and path.name != "tests"]
    files = [file for top in tops for file in (top.rglob("*.py") if top.is_dir() else [top])]
    names: set[str] = set()
    for file in (file for file in files if file.suffix == ".py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - {path.stem for path in tops} - set(sys.stdlib_module_names)


def test_requirements_name_every_package_that_is_imported_and_no_other():
    lines = requirement_lines(REPOSITORY / "requirements.txt")
    required = {Requirement(line).name.lower() for line in lines}
    imported = {PACKAGES.get(name, name.replace("_", "-").lower()) for name in imported_names()}
    # Optional: the prompt tool and the benchmark say how to install what they need. Attention works
    # without FlashAttention-4, and the set-up without packaging.
    assert imported - required == {"openai", "diffusers", "peft", "flash-attn", "packaging"}
    assert required - imported == INDIRECT
