"""Checks that the weights in a file have the names and shapes that a model expects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sgm.errors import UserError, first_of


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Find the differences between the weights of a file and the weights of a model.

    Args:
        found: name → tensor in the file.
        wanted: name → tensor in the model, which may be on the meta device.

    Returns:
        Kind of difference → names. "of another shape": each name with both shapes; "of integer
        type": integer tensors that are floating-point in the model; "missing"; "unknown".
    """
    return {
        "of another shape": [
            f"{name} is {list(found[name].shape)} in the file, {list(tensor.shape)} in the model"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ],
        "of integer type": [
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
    """Check that a file has exactly the weights of a model. Order and precision may differ.

    Args:
        found: name → tensor in the file.
        wanted: name → tensor in the model, which may be on the meta device.
        path: the path of the file, for the message.
        hint: the end of the message: what to do or to check.
        model: the name of the model in the message.

    Raises:
        UserError: names, shapes or types differ; for each kind of `differences` the message gives
            the number of names and the first of them.
    """
    clauses = [
        f"{len(names)} {kind} ({first_of(names)})"
        for kind, names in differences(found, wanted).items()
        if names
    ]
    if clauses:
        raise UserError(f"{path} does not fit {model}: keys {'; '.join(clauses)}; {hint}")
