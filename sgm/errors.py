"""The exception for mistakes of the user, and hints at mistyped names for its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

# A name counts as a typo of another if difflib's similarity ratio reaches this value. Distinct keys
# that look alike, such as latent_height and latent_width, reach only 0.78.
_MISTYPED = 0.85


class UserError(Exception):
    """An error caused by the user's input: a wrong path, key, value or file.

    The message is one sentence that says what is wrong, where, and what to do. Commands print the
    message as ``error: …`` and exit with code 1, without a stack trace.
    """


def first_of(names: Sequence[str], most: int = 3) -> str:
    """Join the first `most` of `names` with commas, followed by an ellipsis if there are more."""
    return ", ".join([*names[:most], *["…"][: len(names) > most]])


def mistyped_as(name: str, present: object) -> str:
    """Return a hint for messages about a missing key: a key of `present` that may be a typo of it.

    In a message the hint follows the missing key, `name`. The hint is empty if no key is similar,
    or if `present` is not a mapping.
    """
    keys = [str(key) for key in present] if isinstance(present, Mapping) else []
    close = difflib.get_close_matches(name, keys, n=1, cutoff=_MISTYPED)
    return f" (is {close[0]!r} mistyped?)" if close and name not in keys else ""


def check_known(keys: Iterable[object], known: Iterable[str], *, where: str) -> None:
    """Check that a mapping has only known keys.

    Args:
        keys: the keys of the mapping, of any type, because YAML keys may be numbers.
        known: the valid keys.
        where: what contains the keys, for the message.

    Raises:
        UserError: a key is unknown; the message suggests the nearest valid key.
    """
    names = list(known)
    for key in keys:
        if key not in names:
            raise UserError(f"unknown key {str(key)!r} in {where}; {nearest_name(key, names)}")


def nearest_name(name: object, valid: Iterable[str]) -> str:
    """Return a hint for an unknown `name`: the most similar valid name, or all valid names.

    The hint ends a message, for example ``did you mean 'load'?``. `name` may have any type, because
    YAML keys may be numbers.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are: {', '.join(names) or '(none)'}"
