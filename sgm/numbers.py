"""Numbers that come from a configuration, checked where they enter."""

from __future__ import annotations

import math
from numbers import Real

from sgm.errors import UserError


def is_number(value: object) -> bool:
    """Whether a value is a real number; true is none here, although an int in Python."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """The same without infinities and NaN."""
    return is_number(value) and math.isfinite(value)


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
) -> None:
    """Refuse a configuration value that is not a finite number of [`low`, `high`].

    Args:
        name: what the user calls the value, for the message, e.g. ``DynamicCFG: exp``.
        whole: require a whole number; ``5.0`` counts as one.

    Raises:
        UserError: `value` is no number (a bool is none either), not finite or out of range.
    """
    kind = "a whole number" if whole else "a number"
    if is_finite_number(value) and low <= value <= high and (not whole or value % 1 == 0):
        return
    if math.isfinite(low) and math.isfinite(high):
        bounds = f" from {low:g} to {high:g}"
    else:
        bounds = f" of at least {low:g}" if math.isfinite(low) else ""
    raise UserError(f"{name}={value!r}: give {kind}{bounds} in the configuration")
