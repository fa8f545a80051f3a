"""Read prompts from a file or standard input, and name the output folder of each prompt."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sgm.errors import UserError
from sgm.files import expanded

MAX_NAME_CHARACTERS = 120
# Linux allows 255 bytes for a file name. The line number and an underscore precede the prompt.
_MAX_NAME_BYTES = 240


@dataclass(frozen=True)
class Prompt:
    """A prompt and its line number, which starts at 0 and is part of the seed."""

    line: int
    text: str

    @property
    def folder_name(self) -> str:
        """The folder name ``{line}_{prompt}``, shortened and valid on every file system."""
        safe = re.sub(r"[^\w\-.,' ]+", "_", self.text).strip(" ._")[:MAX_NAME_CHARACTERS]
        safe = safe.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").rstrip(" ._")
        return f"{self.line}_{safe or 'prompt'}"


def read_prompt_file(path: str | Path) -> list[Prompt]:
    """Read the prompts of a UTF-8 text file with one prompt per line.

    Blank lines are skipped, but they count as lines in the numbers of the prompts.

    Raises:
        UserError: the file is missing, is not UTF-8, or contains no prompt.
    """
    text, problem = "", "it contains no prompt"
    try:
        text = expanded(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not valid UTF-8"
    except (OSError, ValueError) as error:  # ValueError: NUL in its name
        problem = getattr(error, "strerror", None) or str(error)
    prompts = [Prompt(i, line.strip()) for i, line in enumerate(text.split("\n")) if line.strip()]
    if not prompts:
        raise UserError(
            f"input_file {path} cannot be used ({problem}); give a UTF-8 text file with one prompt "
            "per line"
        )
    return prompts


def read_typed_prompts() -> Iterator[Prompt]:
    """Yield the prompts of standard input, one per line, numbered from 0, until the input ends.

    On a terminal, the user is asked for each prompt.

    Raises:
        UserError: the input ends without a prompt.
    """
    if hasattr(sys.stdin, "reconfigure"):  # invalid UTF-8 must not end the session
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    found = False
    for line in itertools.count():
        if sys.stdin.isatty():
            print("prompt (Ctrl-D ends): ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline()
        if not text:
            break
        if text.strip():
            found = True
            yield Prompt(line, text.strip())
    if not found:
        raise UserError("no prompt was typed; type one prompt per line, or use input_type: txt")
