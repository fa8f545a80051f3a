"""The one exception that commands turn into a sentence for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake outside the code: a wrong path, key, value or file.

    Its message is one sentence that says what is wrong, where, and what to do. Commands print it
    as ``error: …`` and exit with code 1; a stack trace would add nothing to it.
    """


def nearest_name(name: object, valid: Iterable[str]) -> str:
    """A clause that helps with a mistyped `name`: the closest of `valid`, or all of them.

    `name` may be of any type: the keys of a YAML file may be numbers. Returns text to be put after
    the statement of the error, e.g. ``did you mean 'load'?``.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are: {', '.join(names) or '(none)'}"
