"""Base classes for options (pydantic models), and messages that say what a value must be."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from sgm.errors import UserError, mistyped_as, nearest_name

Model = TypeVar("Model", bound=BaseModel)

_KINDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
}
_LIMITS = {"ge": "of at least", "gt": "above", "le": "up to", "lt": "below", "min_length": ""}


class Options(BaseModel):
    """Options with strict types: strings are not converted, and unknown keys are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def option(default: object, description: str, **limits: Any) -> Any:  # noqa: ANN401 (as Field)
    """Return a field for an `Options` class.

    Args:
        default: the value if the option is not set.
        description: the meaning of the option, for ``--help`` and the documentation.
        limits: limits of the value, under pydantic's names: `ge`, `gt`, `le`, `lt`, `min_length`.
    """
    return Field(default, description=description, **limits)


class Section(BaseModel):
    """Like `Options`, but allows extra keys, for sections that other code reads too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def checked(model: type[Model], values: Mapping[str, Any], *, place: Callable[[str], str]) -> Model:
    """Validate `values` and return them as an object of the class `model`.

    Args:
        model: the class that declares the options.
        values: option → value. Keys may be of any type, because YAML keys may be.
        place: a function that takes an option's dotted name and returns where the option was set,
            for messages.

    Raises:
        UserError: a key is unknown, a value is missing, or a value has the wrong type or range.
    """
    try:
        return model.model_validate({str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise UserError(explain(error, model, place=place)) from None


def explain(error: ValidationError, model: type[BaseModel], *, place: Callable[[str], str]) -> str:
    """Return one sentence about the first error that pydantic found; arguments as in `checked`."""
    first = error.errors(include_url=False)[0]
    keys = [key for key in first["loc"] if isinstance(key, str)]
    owner, field = _find_field(model, keys)
    where = place(".".join(keys))
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        parent = place(".".join(keys[:-1]))
        return f"unknown key {keys[-1]!r} in {parent}; {nearest_name(keys[-1], _names(owner))}"
    if kind == "missing":
        hint = mistyped_as(keys[-1], value)
        return f"{where} is missing{hint}" + (f"; it must be {describe(field)}" if field else "")
    if kind in ("value_error", "assertion_error"):  # raised by our own validator
        reason = str(first["ctx"]["error"])
        return f"{where}: {reason}" if where else reason
    if field is None or not issubclass(owner, Options | Section):
        return f"{where}: {value!r:.100}: {first['msg']}"
    expected = describe(field, element=isinstance(first["loc"][-1], int))
    if kind == "finite_number":
        expected = expected.replace("a number", "a finite number")
    return f"{where}: {value!r:.100} must be {expected}"


def _names(model: type[BaseModel]) -> list[str]:
    """Return the names under which users set the fields of `model`: the alias, if there is one."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _find_field(
    model: type[BaseModel], keys: Iterable[str]
) -> tuple[type[BaseModel], FieldInfo | None]:
    """Follow `keys` through nested models; return the model that has the last key, and its field.

    The field is None if the model has no such key.
    """
    field: FieldInfo | None = None
    for key in keys:
        if field is not None:
            kinds = [field.annotation, *typing.get_args(field.annotation)]
            model = next((kind for kind in kinds if hasattr(kind, "model_fields")), model)
        fields = model.model_fields
        field = next((f for name, f in fields.items() if key in (name, f.alias)), None)
    return model, field


def value_type(annotation: object) -> tuple[object, tuple[str, ...], bool]:
    """Split a field's annotation into its type, its allowed values and whether it is a list.

    For a list, the type is that of its elements. An optional type counts as the type itself.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return str, inner, False
    if origin is list:
        return inner[0], (), True
    if origin in (typing.Union, types.UnionType):  # str | None
        return value_type(inner[0])
    return annotation, (), False


def describe(field: FieldInfo, *, element: bool = False) -> str:
    """Return what the value of a field must be, such as ``a whole number of at least 1``.

    Args:
        field: the field.
        element: whether to describe an element of the field's list instead.
    """
    kind, choices, is_list = value_type(field.annotation)
    if choices:
        return " or ".join(map(repr, choices))
    limits: dict[str, Any] = {}
    for limit in field.metadata:
        limits |= {name: getattr(limit, name) for name in _LIMITS if hasattr(limit, name)}
    if is_list and not element:
        return f"a list of {_KINDS.get(kind, 'a value').removeprefix('a ')}s"
    name = _KINDS.get(kind, "a section with keys")
    if "min_length" in limits:
        return f"{name} that is not empty"
    if "ge" in limits and "le" in limits:
        low, high = limits["ge"], limits["le"]
        return f"{low}" if low == high else f"{name} from {low} to {high}"
    bounds = " and ".join(f"{_LIMITS[key]} {value}" for key, value in limits.items())
    return f"{name} {bounds}".rstrip()
