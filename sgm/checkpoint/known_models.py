"""Comparing weights with the models that configurations describe, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from sgm.checkpoint.blueprint import build_on_meta, model_of, sizes_of
from sgm.checkpoint.fit import differences, wanted_of, without_positions
from sgm.errors import UserError


@dataclass(frozen=True, eq=False)
class KnownModel:
    """A model that a configuration describes.

    Args:
        config: the configuration's file, as a user would name it.
        model: its `model` section.
        load: where its transformer's weights should be.
    """

    config: str
    model: Mapping[str, Any]
    load: str | None

    @cached_property
    def transformer(self) -> dict[str, Tensor]:
        """Names and shapes of the transformer; on the meta device."""
        return build_on_meta(self.model["network_config"]).state_dict()

    @cached_property
    def vae(self) -> dict[str, Tensor]:
        """Names and shapes of the autoencoder; on the meta device."""
        return build_on_meta(self.model["first_stage_config"]).state_dict()


@dataclass(frozen=True)
class Comparison:
    """How weights relate to the known model that is nearest to them.

    Args:
        known: that model.
        fits: whether its configuration takes the weights as they are.
        differences: of the weights from a model of that kind with the sizes that they tell, or
            from the known one if they do not: kind → names, as `sgm.checkpoint.fit.differences`.
    """

    known: KnownModel
    fits: bool
    differences: Mapping[str, list[str]]

    @property
    def is_whole(self) -> bool:
        """Whether the weights are all that a model of some sizes has, and no more."""
        return not any(self.differences.values())


def compare(
    shapes: Mapping[str, Tensor], part: Literal["transformer", "vae"], known: Sequence[KnownModel]
) -> Comparison:
    """Find the known model that is nearest to weights, and what they have more or less than it.

    Args:
        shapes: name in SAT → tensor, on the meta device.
        part: what they are.
        known: one at least.
    """
    found = {m: differences(shapes, wanted_of(getattr(m, part), shapes)) for m in known}
    nearest = min(known, key=lambda model: sum(map(len, found[model].values())))
    if not any(found[nearest].values()):
        return Comparison(nearest, True, found[nearest])
    try:
        own = model_of(sizes_of(shapes, part, ""), part, where="").state_dict()
    except UserError:  # they tell no sizes, or ones that no model can have
        return Comparison(nearest, False, found[nearest])
    rest = differences(without_positions(shapes), without_positions(own))
    return Comparison(nearest, False, rest)
