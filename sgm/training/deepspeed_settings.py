"""Sections of DeepSpeed's settings: what is wrong with them, before anything is loaded."""

from __future__ import annotations

import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from sgm.errors import UserError, nearest_name

# What DeepSpeed raises for settings it refuses, besides its own error.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError)
_AUTOCAST_KEYS = ("enabled", "dtype", "lower_precision_safe_modules")


def weight_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """The precision that DeepSpeed's sections ``bf16`` and ``fp16`` give the weights."""
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config

    present = {key: section for key, section in settings.items() if section is not None}
    if get_bfloat16_config(present).enabled:
        return torch.bfloat16
    return torch.float16 if get_float16_config(present).enabled else torch.float32


def check_sections(settings: Mapping[str, Any]) -> None:
    """Check sections of the `deepspeed` section by DeepSpeed's own description of them.

    Its engine does so too, but after the weights are read, and without the nearest valid name.

    Raises:
        UserError: a key is unknown, a value is not what it may be, or float16 would be trained
            wrongly.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils import logger as deepspeed_logger

    descriptions = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,  # its older name
        "fp16": DeepSpeedFP16Config,
    }
    deepspeed_logger.disabled = True  # of old names it will warn when it starts
    try:
        for name, description in descriptions.items():
            section = settings.get(name) or {}
            try:
                description(**{str(key): value for key, value in section.items()})
            except REFUSALS as error:
                raise UserError(_fault(error, name, description)) from None
    finally:
        deepspeed_logger.disabled = False
    _check_autocast(settings.get("torch_autocast") or {})
    _check_half(settings)


def _check_half(settings: Mapping[str, Any]) -> None:
    """Check that float16 is not beside bfloat16, and will be trained with its scale of the loss."""
    from deepspeed.runtime.precision_config import get_float16_config

    half = get_float16_config({"fp16": settings.get("fp16") or {}})
    if not half.enabled:
        return
    if weight_dtype(settings) == torch.bfloat16:
        raise UserError("deepspeed: bf16 and fp16 are both enabled; leave one")
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    if not stage and half.loss_scale != 1:
        # DeepSpeed 0.19.8 divides gradients by the scale of the loss, which it does not multiply.
        raise UserError(
            "deepspeed.fp16: without ZeRO DeepSpeed does not scale the loss, so that float16 would "
            "learn next to nothing; set zero_optimization.stage to 1, 2 or 3, or use bf16"
        )


def _check_autocast(section: Mapping[str, Any]) -> None:
    """Check the section ``torch_autocast``, of which DeepSpeed has no description."""
    from deepspeed.runtime.config import DtypeEnum

    for key in section:
        if key not in _AUTOCAST_KEYS:
            hint = nearest_name(str(key), _AUTOCAST_KEYS)
            raise UserError(f"unknown key {str(key)!r} in deepspeed.torch_autocast; {hint}")
    if not section.get("enabled"):
        return
    name = section.get("dtype")
    try:
        is_bfloat16 = DtypeEnum(name).value == torch.bfloat16
    except REFUSALS:
        is_bfloat16 = False
    if not is_bfloat16:
        # Without a dtype PyTorch's default is float16 on a GPU. There DeepSpeed 0.19.8 clips the
        # gradients under ZeRO while they are scaled up; without ZeRO the loop would take the
        # first overflows, with which the scale is found, for gradients that are not finite.
        raise UserError(
            f"deepspeed.torch_autocast.dtype: {name!r} must be bfloat16; float16 is for the "
            "section fp16"
        )


def _fault(error: Exception, name: str, description: Any) -> str:
    """What is wrong with a section of which pydantic, or DeepSpeed, raised `error`."""
    if not hasattr(error, "errors"):
        return f"deepspeed.{name}: {reason_of(error)}"
    first = error.errors()[0]
    *parents, key = [f"deepspeed.{name}", *(str(part) for part in first["loc"])]
    if first["type"] == "extra_forbidden":
        hint = nearest_name(key, _fields(description, parents[1:]))
        return f"unknown key {key!r} in {'.'.join(parents)}; {hint}"
    value = f"{reprlib.repr(first['input'])}: " if parents else ""
    return f"{'.'.join([*parents, key])}: {value}{first['msg']}"


def _fields(description: Any, parents: Sequence[str]) -> list[str]:
    """Names that a pydantic class has for its fields, or the class within it under `parents`."""
    for parent in parents:
        if parent in description.model_fields:  # it may be a place in a list
            kind = description.model_fields[parent].annotation
            kinds = [kind, *get_args(kind), description]  # it may be an optional class
            description = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    return [field.alias or name for name, field in description.model_fields.items()]


def reason_of(error: Exception) -> str:
    """What DeepSpeed says of its settings, on one line; of a faulty key, where it is."""
    if hasattr(error, "errors"):  # pydantic's, which checks the sections
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{error.title}: {place}: {first['msg']}"
    reason = textwrap.shorten(str(error), 300, placeholder=" …") or "no reason given"
    return f"{type(error).__name__}: {reason}"
