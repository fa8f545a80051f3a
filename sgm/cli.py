"""What every command does alike: logging, and errors as one sentence with an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from sgm.errors import UserError


def set_up_logging() -> None:
    """Plain lines on stderr: everything on rank 0, only warnings on the other ranks."""
    level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main`; its exit code, or 1 and a sentence for a user's mistake."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
