"""Whether the weights of a file are those of a model: the same names, the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgm.checkpoint.blueprint import model_of, sizes_of
from sgm.checkpoint.table import POSITION_TABLE, Part, on_meta
from sgm.errors import UserError, first_of


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of a file's weights, `found`, that are not as in a model, `wanted`.

    Returns:
        Names "of another shape", each with both shapes, "of whole numbers" where the model has
        others, "missing" ones and "unknown" ones.
    """
    return {
        "of another shape": [
            f"{name} is {list(found[name].shape)} in the file, {list(tensor.shape)} in the model"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ],
        "of whole numbers": [
            f"{name} is {str(found[name].dtype)[6:]}"
            for name, tensor in wanted.items()
            if name in found and tensor.is_floating_point() > found[name].is_floating_point()
        ],
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
    }


def check_fit(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    path: str | Path,
    hint: str,
    model: str = "the model of the configuration",
) -> None:
    """Compare names, shapes and kinds of a file's weights, `found`, with a model's, `wanted`.

    Args:
        found: name → tensor of the file.
        wanted: name → tensor of the model, which may be on the meta device.
        path: the file, for the message.
        hint: end of the message: what to do or to check.
        model: what the message calls the model.

    Raises:
        UserError: they differ; it names the first few of each kind.
    """
    clauses = [
        f"{len(names)} {kind} ({first_of(names)})"
        for kind, names in differences(found, wanted).items()
        if names
    ]
    if clauses:
        raise UserError(f"{path} does not fit {model}: keys {'; '.join(clauses)}; {hint}")


def check_weights(
    tensors: Mapping[str, Tensor],
    part: Part,
    model: nn.Module,
    *,
    where: str | Path,
    described_by: str,
) -> dict[str, Any]:
    """Compare the weights of a part with the model of a configuration; their sizes.

    Args:
        tensors: names as in SAT; the position table may be absent.
        part: transformer or vae.
        model: on the meta device.
        where: the file, for messages.
        described_by: the configuration, for messages.

    Raises:
        UserError: sizes differ, or names or shapes are absent or too many.
    """
    wanted = wanted_of(model.state_dict(), tensors)
    found, expected = sizes_of(tensors, part, where), sizes_of(wanted, part, described_by)
    for key, value in found.items():
        if value != expected[key]:
            raise UserError(
                f"{where} has {key}={value}, but {described_by} describes a model with {key}="
                f"{expected[key]}; name the configuration of these weights with --base"
            )
    hint = f"copy the file again, or name its configuration instead of {described_by} with --base"
    check_fit(on_meta(tensors), wanted, path=where, hint=hint)
    return found


def check_whole_part(
    tensors: Mapping[str, Tensor], part: Part, config: Mapping[str, Any], *, where: str | Path
) -> dict[str, Any]:
    """Check that weights of diffusers are those of a whole CogVideoX-2B of any size; their sizes.

    Args:
        tensors: under SAT's names.
        part: transformer or vae.
        config: diffusers' config.json; sizes that it has must be those of the weights.
        where: the folder, for messages.

    Raises:
        UserError: config.json says other sizes, or names or shapes are absent or too many.
    """
    sizes = sizes_of(tensors, part, where)
    for key, value in sizes.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where} has {key}={value}, but its config.json says {config[key]!r}; copy both "
                "from the original again"
            )
    check_fit(
        without_positions(on_meta(tensors)),
        without_positions(model_of(sizes, part, where=where).state_dict()),
        path=where,
        model="a model of its sizes",
        hint="copy it from the original again",
    )
    return sizes


def without_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the position table, which is computed where it is absent; clips tell its size."""
    return {name: tensor for name, tensor in tensors.items() if name != POSITION_TABLE}


def wanted_of(model: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model wants of weights: its position table only where they have one."""
    return dict(model) if POSITION_TABLE in found else without_positions(model)
