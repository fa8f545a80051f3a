"""Whether the weights of a file are those of a model: the same names, the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

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
