"""Which LoRAs to merge and how strongly, as the command line and YAML files say it.

Imports nothing heavy, so that a mistake is answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgm.errors import UserError, nearest_name
from sgm.numbers import is_finite_number

_KEYS = ("path", "scale")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA to merge.

    Args:
        path: a run's folder, a checkpoint's or a file; see `sgm.checkpoint.read_lora`.
        scale: strength; 1 is as trained, 0 nothing, below 0 the opposite.
    """

    path: str
    scale: float = 1.0


def lora_from_text(text: str) -> LoraChoice:
    """``PATH`` or ``PATH:SCALE``; where a path of the whole text exists, it is meant.

    Raises:
        UserError: the scale is not finite, or no number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or not path or os.path.exists(os.path.expanduser(text)):
        return LoraChoice(text)
    try:
        scale = float(number)
    except ValueError:
        if os.path.exists(os.path.expanduser(path)):
            raise UserError(
                f"--lora {text}: {colon + number!r} is no number; write the strength after the "
                "colon, as in PATH:0.8"
            ) from None
        return LoraChoice(text)  # a colon of the path itself
    return LoraChoice(path, _checked_scale(scale, where=text))


def loras_from_yaml(value: Any) -> list[LoraChoice]:
    """The value of ``lora:``, a path or ``{path, scale}``, or a list of these.

    Raises:
        UserError: it is something else; the sentence says what, not in which file.
    """
    items = value if isinstance(value, list) else [value]
    return [_from_item(item) for item in items]


def _from_item(item: Any) -> LoraChoice:
    if isinstance(item, str) and item:
        return lora_from_text(item)
    if not isinstance(item, Mapping):
        raise UserError(
            f"{item!r} is not a LoRA: write a path, or {{path: …, scale: …}}, or a list of these"
        )
    for key in item:
        if key not in _KEYS:
            raise UserError(f"unknown key {str(key)!r} in {dict(item)}; {nearest_name(key, _KEYS)}")
    path = item.get("path")
    if not isinstance(path, str) or not path:
        raise UserError(f"{dict(item)} has no path; it must name the LoRA's folder or file")
    return LoraChoice(path, _checked_scale(item.get("scale", 1.0), where=path))


def _checked_scale(value: Any, *, where: str) -> float:
    if not is_finite_number(value):
        raise UserError(
            f"scale {value!r} of {where} must be a finite number; 1 is the LoRA as trained"
        )
    return float(value)
