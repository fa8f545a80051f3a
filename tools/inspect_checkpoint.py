"""What a file or folder of weights is, whether it loads, and what to do with it.

    python tools/inspect_checkpoint.py PATH

Runs no code from the file, and reads names and shapes, not the weights. Exit code 1 where it is
something else, or does not load.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import parse_config
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import SamplingArgs
from sgm.errors import UserError

if TYPE_CHECKING:
    from tools.weights.findings import Finding, KnownModel

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("configs/cogvideox_2b_infer.yaml", "configs/cogvideox_tiny_infer.yaml")


@cache
def known_models() -> tuple[KnownModel, ...]:
    """The models of the shipped configurations."""
    from tools.weights.findings import KnownModel

    known = []
    for name in CONFIGS:
        config = parse_config(SamplingArgs, "", ["--base", str(ROOT / name)])
        load = config.args.load
        known.append(KnownModel(name, config.model, load and os.path.join(ROOT, load)))
    return tuple(known)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: names come from strangers' files."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def render(finding: Finding, path: str) -> str:
    """The lines to show, names in one column and values in the other."""
    rows = [("path", path), ("what", finding.kind), *finding.facts]
    if finding.problem:
        rows.append(("will load", f"no: {finding.problem}"))
    elif finding.use:
        rows.append(("will load", f"yes, {finding.use}"))
    rows += [("" if i else "next", step) for i, step in enumerate(finding.next_steps)]
    width = max(len(name) for name, _ in rows) + 2
    return printable("\n".join(f"{name:{width}}{value}".rstrip() for name, value in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect one path and say what it is; returns the exit code."""
    parser = CommandParser(
        description="Say what a file or folder of weights is, and whether it loads."
    )
    parser.add_argument("path", metavar="PATH", help="any file or folder")
    options = parser.parse_args(argv)
    set_up_logging(logging.ERROR)  # what would be warned of is in the lines below
    from tools.weights.inspect import inspect

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, on a damaged file
            finding = inspect(options.path, known_models())
    except UserError as error:
        raise UserError(printable(str(error))) from None
    print(render(finding, options.path))
    return 1 if finding.problem else 0


if __name__ == "__main__":
    run_and_exit(main)
