"""Prompts: where they come from, and the folder that each one's videos go to."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sgm.errors import UserError

MAX_NAME_CHARACTERS = 120
# Linux allows 255 bytes for a name; the line's number and an underscore go before the prompt.
_MAX_NAME_BYTES = 240


@dataclass(frozen=True)
class Prompt:
    """A prompt and the line it stood on, from 0; the line takes part in the seed."""

    line: int
    text: str

    @property
    def folder_name(self) -> str:
        """``{line}_{prompt}`` as a name that every file system takes."""
        safe = re.sub(r"[^\w\-.,' ]+", "_", self.text).strip(" ._")[:MAX_NAME_CHARACTERS]
        safe = safe.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").rstrip(" ._")
        return f"{self.line}_{safe or 'prompt'}"


def read_prompt_file(path: str | Path) -> list[Prompt]:
    """The prompts of a UTF-8 text file, one a line; blank lines are skipped but counted.

    Raises:
        UserError: the file is absent, not UTF-8, or holds no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"input_file {path} is not UTF-8 (byte {error.start}); save it as UTF-8 and try again"
        ) from None
    except OSError as error:
        raise UserError(
            f"input_file {path} cannot be read ({error.strerror}); give a text file with one "
            "prompt on a line"
        ) from None
    prompts = [Prompt(i, line.strip()) for i, line in enumerate(text.split("\n")) if line.strip()]
    if not prompts:
        raise UserError(f"input_file {path} holds no prompt; write one on each line")
    return prompts


def read_typed_prompts() -> Iterator[Prompt]:
    """Prompts from standard input until its end, numbered from 0; asks for each on a terminal.

    Raises:
        UserError: the input ends without any.
    """
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text must not end the session
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    line, found = 0, False
    while True:
        if sys.stdin.isatty():
            print("prompt (Ctrl-D ends): ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline()
        if not text:
            break
        if text.strip():
            found = True
            yield Prompt(line, text.strip())
        line += 1
    if not found:
        raise UserError("no prompt was typed; type one on each line, or use input_type: txt")
