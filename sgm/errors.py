"""The one exception that commands turn into a sentence for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

# difflib's ratio from which on a name counts as another one, mistyped. Distinct keys that look
# alike, such as latent_height and latent_width, reach 0.78.
_MISTYPED = 0.85


class UserError(Exception):
    """A mistake outside the code: a wrong path, key, value or file.

    The message is one sentence that says what is wrong, where, and what to do. Commands print it
    as ``error: …`` and exit with code 1, without a stack trace.
    """


def first_of(names: Sequence[str], most: int = 3) -> str:
    """Join the first of `names` with commas; an ellipsis stands for the rest."""
    return ", ".join([*names[:most], *["…"][: len(names) > most]])


def mistyped_as(name: str, present: object) -> str:
    """Return a clause for a missing key that may be mistyped in the mapping `present`.

    The clause follows the name of the key in a message; it is empty if no key is similar, or if
    `present` is not a mapping.
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
    """Return a clause that helps with a mistyped `name`: the closest of `valid`, or all of them.

    The clause ends a message, for example ``did you mean 'load'?``. `name` may have any type, since
    the keys of a YAML file may be numbers.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are: {', '.join(names) or '(none)'}"
