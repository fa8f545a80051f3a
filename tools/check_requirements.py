"""Say whether the Python that runs this meets a requirements file, from its metadata alone.

    python tools/check_requirements.py requirements.txt

Prints what is unmet, one package a line, and exits with 1 if there is any. Only the standard
library is used, nothing is imported from the packages, and the answer takes about 0.1 s.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_LINE = re.compile(
    r"""(?P<name>[\w.-]+)==(?P<pin>[\w.+]+)
        (\s*;\s*python_version\s*(?P<marker>\S+)\s*"(?P<marker_version>[\d.]+)")?
        \s+\#\s+((?P<range>[<>=!]=?[^:\s]+):\s)?(?P<reason>\S.*)""",
    re.VERBOSE,
)
_BOUND = re.compile(r"(==|>=|<)([\d.]+)")


@dataclass(frozen=True)
class Requirement:
    """A line of a requirements file: the version to install and the range that will do."""

    name: str
    pin: str
    accepts: str

    def is_met_by(self, version: str) -> bool:
        """Whether an installed `version` lies in the range; local parts (+cpu) do not count."""
        return all(_holds(version, bound) for bound in self.accepts.split(","))


def _release(version: str) -> list[int]:
    """The leading numbers of a version: 2.11.0a0+cu130 gives [2, 11], as trailing zeros go."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def _holds(version: str, bound: str) -> bool:
    match = _BOUND.fullmatch(bound)
    if match is None:
        raise ValueError(f"{bound!r} is no bound; write ==, >= or < and a version")
    operator, limit = match[1], _release(match[2])
    have = _release(version)
    return {"==": have == limit, ">=": have >= limit, "<": have < limit}[operator]


def with_included(path: Path) -> list[Path]:
    """`path` and the requirements files that its ``-r`` lines name, these first."""
    included = re.findall(r"^-r\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [file for name in included for file in with_included(path.parent / name)] + [path]


def _requirements(path: Path) -> Iterator[Requirement]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith(("#", "-r")):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{path}:{number}: not of the form 'name==version  # range: reason'")
        marker, this_python = match["marker"], f"{sys.version_info[0]}.{sys.version_info[1]}"
        if marker is None or _holds(this_python, marker + match["marker_version"]):
            yield Requirement(match["name"], match["pin"], match["range"] or f"=={match['pin']}")


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements of `path` and of the files that it includes, for this version of Python.

    Raises:
        ValueError: a line is not of the form that requirements.txt describes.
    """
    return [requirement for file in with_included(path) for requirement in _requirements(file)]


def unmet_requirements(path: Path) -> list[str]:
    """What this Python lacks of `path`: ``name (absent)`` or ``name (version, needs range)``."""
    unmet = []
    for requirement in read_requirements(path):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name} (absent)")
            continue
        if not requirement.is_met_by(version or ""):  # None where an installation was cut short
            unmet.append(f"{requirement.name} ({version}, needs {requirement.accepts})")
    return unmet


if __name__ == "__main__":
    missing = unmet_requirements(Path(sys.argv[1]))
    print("\n".join(missing), end="\n" if missing else "")
    sys.exit(1 if missing else 0)
