"""The one exception that commands turn into a sentence for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

# Of difflib, from which on a name is another one mistyped; keys that are neighbours, such as
# latent_height and latent_width, are at 0.78 at most.
_MISTYPED = 0.85


class UserError(Exception):
    """A mistake outside the code: a wrong path, key, value or file.

    Its message is one sentence that says what is wrong, where, and what to do. Commands print it
    as ``error: …`` and exit with code 1; a stack trace would add nothing to it.
    """


def first_of(names: Sequence[str], most: int = 3) -> str:
    """The first of `names`, with commas; an ellipsis stands for the rest."""
    return ", ".join([*names[:most], *["…"][: len(names) > most]])


def mistyped_as(name: str, present: object) -> str:
    """A clause for a key that is absent from a mapping, `present`, where it may be mistyped there.

    Returns text to be put after the name of the key, or nothing; `present` may be of any type.
    """
    keys = [str(key) for key in present] if isinstance(present, Mapping) else []
    close = difflib.get_close_matches(name, keys, n=1, cutoff=_MISTYPED)
    return f" (is {close[0]!r} mistyped?)" if close and name not in keys else ""


def check_known(keys: Iterable[object], known: Iterable[str], *, where: str) -> None:
    """Check the keys of a mapping.

    Args:
        keys: the keys, of any type: those of a YAML file may be numbers.
        known: the valid ones.
        where: what holds the keys, for the message.

    Raises:
        UserError: a key is unknown; names the nearest valid one.
    """
    names = list(known)
    for key in keys:
        if key not in names:
            raise UserError(f"unknown key {str(key)!r} in {where}; {nearest_name(key, names)}")


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
