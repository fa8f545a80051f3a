"""Print what a file or folder of weights is, and whether it loads.

    python tools/inspect_checkpoint.py PATH

Only tensor names, shapes and a few small vectors are read, and no code from the file is run. The
exit code is 1 if PATH is not weights, or if the weights do not load. 'Which weights do you have?'
in README.md explains how to use each kind of weights.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.errors import UserError

if TYPE_CHECKING:
    from tools.weights.inspect import Finding


def printable(text: str) -> str:
    """Return `text` with control characters escaped; a hostile file may have them in its names."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def render(finding: Finding) -> str:
    """Return the lines to print for a finding: a column of names and a column of values."""
    rows = [("path", str(finding.path)), ("what", finding.kind), *finding.facts]
    if finding.problem:
        rows.append(("will load", f"no: {finding.problem}"))
    elif finding.use:
        rows.append(("will load", f"yes, {finding.use}"))
    width = max(len(name) for name, _ in rows) + 2
    return printable("\n".join(f"{name:{width}}{value}".rstrip() for name, value in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect one path, print what it is, and return the exit code."""
    parser = CommandParser(
        description="Print what a file or folder of weights is, and whether it loads."
    )
    parser.add_argument("path", metavar="PATH", help="the file or folder to inspect")
    path = parser.parse_args(argv).path
    set_up_logging(logging.ERROR)  # warnings would only repeat what is printed below
    from tools.weights.inspect import inspect

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about damaged files
            findings = inspect(path)
    except UserError as error:
        raise UserError(printable(str(error))) from None
    print("\n\n".join(map(render, findings)))
    return 1 if any(finding.problem for finding in findings) else 0


if __name__ == "__main__":
    run_and_exit(main)
