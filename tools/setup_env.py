"""Print an interpreter that meets a requirements file, making .venv for it where needed.

    python -m tools.setup_env requirements.txt

The Python that runs this is the answer if it meets the file; else it is the repository's .venv,
made once, completed when another file needs more, and remade when a file that it was made from
pins other versions. Only the standard library is used. stdout carries the path alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tools.check_requirements import unmet_requirements, with_included

REPOSITORY = Path(__file__).resolve().parents[1]
_NO_NETWORK = re.compile(
    "NewConnectionError|NameResolutionError|Temporary failure in name resolution|ProxyError"
    "|ConnectTimeout|Network is unreachable|Connection refused"
)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")  # a text as exit code: printed on stderr, and 1


class Environment:
    """A virtual environment of this repository and the record of what it was made from.

    The record maps a requirements file's name to a digest of its pins. It is written before
    anything else, empty, and a file's entry after all of it is installed; so an environment whose
    set-up was cut short is told from a whole one, and from one that somebody else made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"
        self._record = folder / "setup.json"

    def is_foreign(self) -> bool:
        """Whether somebody made this environment by hand; such a one is never changed."""
        return (self.folder / "pyvenv.cfg").exists() and not self._record.exists()

    def _recorded(self) -> dict[str, str]:
        try:
            return json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}

    def _write_record(self, digests: dict[str, str]) -> None:
        beside = self._record.with_suffix(".partial")
        beside.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._record)

    def has(self, requirements: Path) -> bool:
        """Whether it was made from `requirements` as they are now, and its Python is there."""
        is_current = self._recorded().get(requirements.name) == digest(requirements)
        return is_current and os.access(self.python, os.X_OK)

    def _can_grow(self, requirements: Path) -> bool:
        """Whether all that it was made from still stands, so that only packages are added."""
        recorded = self._recorded()
        files = [requirements.parent / name for name in recorded]
        is_current = all(f.is_file() and recorded[f.name] == digest(f) for f in files)
        return bool(recorded) and is_current and os.access(self.python, os.X_OK)

    def install(self, requirements: Path, base_python: str, *, held: int) -> None:
        """Make or complete the environment so that it has `requirements`.

        Args:
            requirements: the file; the files that it includes are recorded with it.
            base_python: the interpreter, itself in no virtual environment, to make it with.
            held: file descriptor of the lock. pip inherits it, so that the lock outlives this
                process if only this process is killed.
        """
        if not self._can_grow(requirements):
            self.folder.mkdir(exist_ok=True)
            self._write_record({})
            for entry in self.folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != self._record:
                    entry.unlink()
            self._run([base_python, "-m", "venv", str(self.folder)], held)
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
        self._run([*pip, "--no-input", "-r", str(requirements)], held)
        files = with_included(requirements)
        self._write_record(self._recorded() | {file.name: digest(file) for file in files})

    def _run(self, command: list[str], held: int) -> None:
        """Run a step of the set-up, its output in the log and, on a terminal, its last line."""
        variables = os.environ | {"PIP_USER": "0"}  # machines that set it to 1 break every venv
        with self.log.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=variables,
                pass_fds=[held],
            )
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                if sys.stderr.isatty():
                    width = shutil.get_terminal_size().columns - 1
                    print(f"\r\033[K{line.strip()[:width]}", end="", file=sys.stderr, flush=True)
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        if process.wait() != 0:
            _fail(self._why())

    def _why(self) -> str:
        """One sentence for a failed step, from its log."""
        text = self.log.read_text(encoding="utf-8")
        if _NO_NETWORK.search(text):
            return (
                "the requirements could not be installed because pip reached no package index; "
                "connect to the network, or name a mirror in PIP_INDEX_URL, and run this again "
                f"(log: {self.log})"
            )
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
        reason = errors[-1].removeprefix("ERROR: ").rstrip(".")
        return f"the set-up of {self.folder.name} failed: {reason} (log: {self.log})"


def digest(requirements: Path) -> str:
    """A digest of what `requirements` and the files it includes pin, without their comments."""
    lines = [
        line.split("#")[0].strip()
        for file in with_included(requirements)
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock file `path`; yields its descriptor. Says so if another set-up has it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another set-up of this folder is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _base_python() -> str:
    """The interpreter behind the running one, which may be that of a virtual environment."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    python = Path(sys.base_prefix, "bin", f"python{version}")
    return str(python) if python.exists() else sys.executable


def _check_can_make(requirements: Path) -> None:
    # Debian and Ubuntu ship Python without ensurepip until python3-venv is installed.
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        _fail(
            f"{sys.executable} does not meet {requirements.name} and has no venv module to make "
            "an environment with; install it (Debian, Ubuntu: apt-get install python3-venv) or "
            f"activate an environment that meets {requirements.name}"
        )


def _check_foreign(environment: Environment, requirements: Path) -> str:
    """The Python of an environment that this program did not make, if it meets the file."""
    checker = REPOSITORY / "tools" / "check_requirements.py"
    command = [str(environment.python), str(checker), str(requirements)]
    try:
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0:
            return str(environment.python)
    except OSError:
        pass  # a broken link to an interpreter that is gone: as unfit as one that lacks packages
    _fail(
        f"{environment.folder} does not meet {requirements.name} and was not made by this "
        f"set-up; run '{environment.python} -m pip install -r {requirements.name}' or move it away"
    )


def choose_python(requirements: Path, folder: Path) -> str:
    """Path of an interpreter that meets `requirements`: the running one or that of `folder`.

    Exits with 1 and a sentence if there is none and none can be made.
    """
    unmet = unmet_requirements(requirements)
    if not unmet:
        return sys.executable
    environment = Environment(folder)
    if environment.is_foreign():
        return _check_foreign(environment, requirements)
    if environment.has(requirements):
        return str(environment.python)
    _check_can_make(requirements)
    with _locked(folder.with_name(folder.name + ".lock")) as held:
        if not environment.has(requirements):  # else the set-up that was waited for made it
            others = f" and {len(unmet) - 1} more" if len(unmet) > 1 else ""
            _say(
                f"{sys.executable} does not meet {requirements.name}: {unmet[0]}{others}. "
                f"Installing into {folder} (once; may take minutes)"
            )
            start = time.monotonic()
            environment.install(requirements, _base_python(), held=held)
            _say(f"{folder} is ready after {time.monotonic() - start:.0f} s")
    return str(environment.python)


def main() -> None:
    """Print the interpreter for the requirements file that the command line names."""
    try:
        print(choose_python(REPOSITORY / sys.argv[1], REPOSITORY / ".venv"))
    except OSError as error:
        _fail(f"the set-up of {REPOSITORY / '.venv'} failed: {error}")
    except KeyboardInterrupt:
        _say("set-up stopped; the next run starts it again")
        sys.exit(130)


if __name__ == "__main__":
    main()
