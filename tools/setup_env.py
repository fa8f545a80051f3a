"""Print the path of a Python interpreter that meets the requirements, and create .venv if needed.

    python -m tools.setup_env requirements.txt

If the packages of the running interpreter meet the ranges in requirements.in, its own path is
printed. Otherwise pip installs the exact versions of requirements.txt in .venv, and the path of
.venv's interpreter is printed. requirements-dev.in and requirements-dev.txt work the same way. This
script needs only the standard library. It writes nothing but the path to stdout.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _with_included(path: Path) -> list[Path]:
    """Return the requirements files that ``-r`` lines in `path` include, followed by `path`."""
    included = re.findall(r"^-r\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [file for name in included for file in _with_included(path.parent / name)] + [path]


def requirement_lines(path: Path) -> list[str]:
    """Return the requirements in `path` and in the files that it includes, without comments."""
    lines = [
        line.partition("#")[0].strip()
        for file in _with_included(path)
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and not line.startswith("-r")]


def unmet_requirements(path: Path) -> list[str]:
    """Return the requirements in `path` that the packages of this Python do not meet.

    The texts look like ``numpy>=2.0 (missing)`` and ``numpy>=2.0 (installed: 1.26.4)``. Local and
    pre-release parts of a version are ignored: 2.11.0a0+cu130 meets ``>=2.11``.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.version import InvalidVersion, Version
    except ImportError:
        return ["packaging (missing)"]
    unmet = []
    for line in requirement_lines(path):
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
            # `version` is None if an installation was interrupted.
            if not requirement.specifier.contains(Version(version or "").base_version):
                unmet.append(f"{line} (installed: {version})")
        except (metadata.PackageNotFoundError, InvalidVersion):
            unmet.append(f"{line} (missing)")
    return unmet


class Environment:
    """The virtual environment in `folder`, with a lock file beside the folder.

    The folder contains a file ``NAME.stamp`` for each installed requirements file. Before pip
    starts, text is written to the lock file and all stamps are removed. After pip succeeds, stamps
    are written and the lock file is emptied. Therefore, an environment whose set-up was interrupted
    has no stamps, and its lock file has text. An environment that the user created has no stamps,
    and its lock file is empty or missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.lock = folder.with_name(f"{folder.name}.lock")

    def _stamps(self) -> dict[str, str]:
        return {file.stem: file.read_text("utf-8") for file in self.folder.glob("*.stamp")}

    def has(self, requirements: Path) -> bool:
        """Return whether the present `requirements` are installed for the running Python version.

        False if the file has changed since its installation.
        """
        is_installed = self._stamps().get(requirements.name) == stamp(requirements)
        return is_installed and os.access(self.python, os.X_OK)

    def is_users(self) -> bool:
        """Return whether the user created or linked the environment; it is then never changed."""
        is_ours = self._stamps() or (self.lock.exists() and self.lock.stat().st_size > 0)
        return self.folder.is_symlink() or (self.folder.exists() and not is_ours)

    def meets(self, ranges: Path) -> bool:
        """Return whether the environment's packages meet the ranges in the file `ranges`."""
        code = (
            f"from tools.setup_env import *; exit(bool(unmet_requirements(Path({str(ranges)!r}))))"
        )
        try:
            return subprocess.run([self.python, "-c", code], cwd=REPOSITORY).returncode == 0
        except OSError:  # for example, a link to a deleted interpreter
            return False

    def install(self, requirements: Path) -> None:
        """Install `requirements` with pip; recreate the environment first if necessary.

        A complete environment of the running Python version is kept, and pip changes only packages
        that differ.
        """
        is_complete = any(text.startswith(f"{_PYTHON} ") for text in self._stamps().values())
        self.lock.write_text("the set-up is not finished\n", encoding="utf-8")
        for file in self.folder.glob("*.stamp"):
            file.unlink()
        if not (is_complete and os.access(self.python, os.X_OK)):
            _run(
                *(sys.executable, "-m", "venv", "--clear", self.folder),
                failure=f"{sys.executable} cannot create {self.folder}; install its venv module "
                "(Debian, Ubuntu: apt-get install python3-venv) or activate another Python",
            )
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        pip = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        _run(
            *(*pip, *quiet, "-r", requirements),
            failure=f"pip failed to install {requirements.name} (see above); if it cannot reach a "
            "package index, connect to the network or set PIP_INDEX_URL to a mirror, and try again",
        )
        for file in _with_included(requirements):
            (self.folder / f"{file.name}.stamp").write_text(stamp(file), encoding="utf-8")
        self.lock.write_text("", encoding="utf-8")


def _run(*command: str | Path, failure: str) -> None:
    """Run a command with its output on stderr; exit with the message `failure` if it fails."""
    variables = os.environ | {"PIP_USER": "0"}  # some machines set it to 1, which breaks venvs
    output = sys.stderr.fileno()
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, env=variables).returncode:
        sys.exit(f"error: {failure}")


def stamp(requirements: Path) -> str:
    """Return the Python version and a hash of `requirements` and the files that it includes."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in _with_included(requirements))
    return f"{_PYTHON} {hashlib.sha256(text.encode()).hexdigest()}\n"


def choose_python(requirements: Path, folder: Path) -> str:
    """Return the path of an interpreter that meets `requirements`: the running one or `folder`'s.

    Args:
        requirements: a file of exact versions. The ranges are in the file of the same name with the
            suffix ``.in``.
        folder: the virtual environment to use or create.

    Exits with code 1 and an error message if neither meets them and `folder` cannot be set up.
    """
    ranges = requirements.with_suffix(".in")
    unmet = unmet_requirements(ranges)
    if not unmet:
        return sys.executable
    environment = Environment(folder)
    if environment.has(requirements):
        return str(environment.python)
    with environment.lock.open("a") as lock:  # closing the file releases the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another set-up of this folder is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another set-up may have finished the environment during the wait.
        if environment.has(requirements):
            return str(environment.python)
        if environment.is_users():
            if environment.meets(ranges):
                return str(environment.python)
            sys.exit(
                f"error: {folder} does not meet {ranges.name} and was not made by this set-up; run "
                f"'{environment.python} -m pip install -r {requirements.name}' or rename the folder"
            )
        _say(
            f"{sys.executable} does not meet {ranges.name}: {', '.join(unmet)}. "
            f"Installing into {folder} (only once; may take minutes)"
        )
        environment.install(requirements)
        _say(f"{folder} is ready")
    return str(environment.python)


def main() -> None:
    """Print the path of the interpreter for the requirements file named on the command line."""
    try:
        print(choose_python(REPOSITORY / sys.argv[1], REPOSITORY / ".venv"))
    except OSError as error:
        sys.exit(f"error: the set-up of {REPOSITORY / '.venv'} failed: {error}")
    except KeyboardInterrupt:
        _say("set-up stopped; the next run starts it again")
        sys.exit(130)


if __name__ == "__main__":
    main()
