"""Print a Python interpreter that meets the requirements, making .venv if the active one does not.

    python -m tools.setup_env requirements.txt

The interpreter that runs this is printed if its packages lie in the ranges of requirements.in.
Otherwise it is that of .venv, which gets the exact versions of requirements.txt by pip. The same
holds for requirements-dev.in and requirements-dev.txt. Only the standard library is needed. stdout
carries the path alone.
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
    """The requirements files that the ``-r`` lines of `path` name, then `path` itself."""
    included = re.findall(r"^-r\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [file for name in included for file in _with_included(path.parent / name)] + [path]


def requirement_lines(path: Path) -> list[str]:
    """The requirements of `path` and of the files that it includes, without comments."""
    lines = [
        line.partition("#")[0].strip()
        for file in _with_included(path)
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and not line.startswith("-r")]


def unmet_requirements(path: Path) -> list[str]:
    """The requirements of `path` that the packages of this Python do not meet.

    Returns texts like ``numpy>=2.0 (missing)`` and ``numpy>=2.0 (installed: 1.26.4)``. Local and
    pre-release parts of a version do not count, so that 2.11.0a0+cu130 meets ``>=2.11``.
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
            # None if an installation was interrupted.
            if not requirement.specifier.contains(Version(version or "").base_version):
                unmet.append(f"{line} (installed: {version})")
        except (metadata.PackageNotFoundError, InvalidVersion):
            unmet.append(f"{line} (missing)")
    return unmet


class Environment:
    """The virtual environment `folder` and the lock file beside it.

    The folder has a file ``NAME.stamp`` for each installed requirements file. Stamps are removed
    before pip starts and written after it succeeds. In between, the lock file has content. So an
    environment whose set-up was interrupted has no stamp and a lock file with content. An
    environment that the user made has neither.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.lock = folder.with_name(f"{folder.name}.lock")

    def _stamps(self) -> dict[str, str]:
        return {file.stem: file.read_text("utf-8") for file in self.folder.glob("*.stamp")}

    def has(self, requirements: Path) -> bool:
        """Whether `requirements` is installed as it is now, for the running version of Python."""
        is_installed = self._stamps().get(requirements.name) == stamp(requirements)
        return is_installed and os.access(self.python, os.X_OK)

    def is_users(self) -> bool:
        """Whether the user made it or linked to it. Such an environment is never changed."""
        is_ours = self._stamps() or (self.lock.exists() and self.lock.stat().st_size > 0)
        return self.folder.is_symlink() or (self.folder.exists() and not is_ours)

    def meets(self, ranges: Path) -> bool:
        """Whether its packages meet the ranges of a file."""
        code = (
            f"from tools.setup_env import *; exit(bool(unmet_requirements(Path({str(ranges)!r}))))"
        )
        try:
            return subprocess.run([self.python, "-c", code], cwd=REPOSITORY).returncode == 0
        except OSError:  # for example a link to an interpreter that is gone
            return False

    def install(self, requirements: Path) -> None:
        """Install `requirements` with pip, after making the environment anew if necessary.

        A complete environment of this version of Python is kept, and pip changes what differs.
        """
        is_complete = any(text.startswith(f"{_PYTHON} ") for text in self._stamps().values())
        self.lock.write_text("the set-up is not finished\n", encoding="utf-8")
        for file in self.folder.glob("*.stamp"):
            file.unlink()
        if not (is_complete and os.access(self.python, os.X_OK)):
            _run(
                *(sys.executable, "-m", "venv", "--clear", self.folder),
                failure=f"{sys.executable} cannot make {self.folder}; install its venv module "
                "(Debian, Ubuntu: apt-get install python3-venv) or activate another Python",
            )
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        pip = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        _run(
            *(*pip, *quiet, "-r", requirements),
            failure=f"pip cannot install {requirements.name}, see above; if it reaches no package "
            "index, connect to the network or name a mirror in PIP_INDEX_URL; then run this again",
        )
        for file in _with_included(requirements):
            (self.folder / f"{file.name}.stamp").write_text(stamp(file), encoding="utf-8")
        self.lock.write_text("", encoding="utf-8")


def _run(*command: str | Path, failure: str) -> None:
    """Run a command with its output on stderr; exits with the sentence `failure` if it fails."""
    variables = os.environ | {"PIP_USER": "0"}  # a machine that sets it to 1 breaks every venv
    output = sys.stderr.fileno()
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, env=variables).returncode:
        sys.exit(f"error: {failure}")


def stamp(requirements: Path) -> str:
    """The version of Python and a hash of `requirements` with the files that it includes."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in _with_included(requirements))
    return f"{_PYTHON} {hashlib.sha256(text.encode()).hexdigest()}\n"


def choose_python(requirements: Path, folder: Path) -> str:
    """Path of an interpreter that meets `requirements`: the running one or that of `folder`.

    Args:
        requirements: a file of exact versions. The file of the same name that ends in ``.in`` has
            the ranges.
        folder: the virtual environment to use or make.

    Exits with code 1 and a sentence if no such interpreter exists and .venv cannot be made.
    """
    ranges = requirements.with_suffix(".in")
    unmet = unmet_requirements(ranges)
    if not unmet:
        return sys.executable
    environment = Environment(folder)
    if environment.has(requirements):
        return str(environment.python)
    with environment.lock.open("a") as lock:  # closing it unlocks it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another set-up of this folder is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another set-up may have made it while this one waited.
        if environment.has(requirements):
            return str(environment.python)
        if environment.is_users():
            if environment.meets(ranges):
                return str(environment.python)
            sys.exit(
                f"error: {folder} does not meet {ranges.name} and was not made by this set-up; run "
                f"'{environment.python} -m pip install -r {requirements.name}' or move it away"
            )
        _say(
            f"{sys.executable} does not meet {ranges.name}: {', '.join(unmet)}. "
            f"Installing into {folder} (once; may take minutes)"
        )
        environment.install(requirements)
        _say(f"{folder} is ready")
    return str(environment.python)


def main() -> None:
    """Print the interpreter for the requirements file that the command line names."""
    try:
        print(choose_python(REPOSITORY / sys.argv[1], REPOSITORY / ".venv"))
    except OSError as error:
        sys.exit(f"error: the set-up of {REPOSITORY / '.venv'} failed: {error}")
    except KeyboardInterrupt:
        _say("set-up stopped; the next run starts it again")
        sys.exit(130)


if __name__ == "__main__":
    main()
