"""Merging LoRAs: W + Σ scale · alpha / r · B A.

Source of the method: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgm.checkpoint.lora import alpha_of, check_matrices, read_lora, warn_of_other_base
from sgm.checkpoint.lora_formats import NUM_PAIRS
from sgm.checkpoint.table import LazyTensors, on_meta
from sgm.checkpoint.transformer import fingerprint, is_lora_matrix
from sgm.checkpoint.writing import in_dtype, rounded
from sgm.lora_choice import LoraChoice

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer


_HINT = "load must name the base model that the LoRA was trained on, with its configuration"


@dataclass(frozen=True)
class _Update:
    """A LoRA to merge: its matrices, and the factor of B A, which is scale · alpha / r."""

    matrices: Mapping[str, Tensor]
    layers: frozenset[str]
    factor: float


def _read_update(
    choice: LoraChoice, weights: Mapping[str, Tensor], *, base: str, hint: str
) -> _Update:
    """Read a LoRA and compare it with the weights that it is to change.

    Raises:
        UserError: it is no LoRA, or one of another model.
    """
    matrices, record = read_lora(choice.path)
    check_matrices(matrices, record, weights, path=choice.path, hint=hint)
    warn_of_other_base(record, base, choice.path)
    layers = frozenset(name.rsplit(".matrix_", 1)[0] for name in matrices)
    return _Update(matrices, layers, choice.scale * alpha_of(record, choice.path) / record.r)


def _updated(weight: Tensor, layer: str, updates: Iterable[_Update]) -> Tensor:
    """A layer's weight (out, in) and the updates, summed in float32 on its device.

    Without any update that is not zero it is the weight itself: adding 0 would turn -0 into 0.
    """
    total = None
    for update in updates:
        if layer not in update.layers or not update.factor:
            continue
        products = []
        for i in range(NUM_PAIRS[layer.rpartition(".")[2]]):
            down, up = (
                update.matrices[f"{layer}.matrix_{kind}.{i}"].to(weight.device, torch.float32)
                for kind in "AB"
            )  # (r, in), (out / parts, r)
            products.append(up @ down)
        change = torch.cat(products)  # (out, in)
        if change.any():
            change *= update.factor
            total = change if total is None else total.add_(change)
    return weight if total is None else weight.float() + total


@torch.no_grad()
def merge_loras(
    network: DiffusionTransformer, loras: Sequence[LoraChoice], *, base: str | None = None
) -> None:
    """Add LoRAs to the weights of a network without LoRA layers: W + Σ scale · alpha / r · B A.

    The sum is taken in float32 on the weight's device and rounded once to its type. Matrices that
    are zero leave every bit as it was.

    Args:
        network: the base model.
        loras: what to add, and how strongly; paths as in `read_lora`.
        base: `fingerprint` of the file that the weights came from; None takes the network's own,
            which is another one if the weights have been rounded to bfloat16 since.

    Raises:
        UserError: a file is not a LoRA, or one of another model; nothing is changed then.
    """
    weights = dict(network.named_parameters())
    if any(is_lora_matrix(name) for name in weights):
        raise RuntimeError("merge_loras: the network has LoRA layers of its own")
    base = base or fingerprint(weights)
    updates = [_read_update(choice, weights, base=base, hint=_HINT) for choice in loras]
    for layer in frozenset[str]().union(*(update.layers for update in updates)):
        weight = weights[f"{layer}.weight"]
        weight.copy_(_updated(weight, layer, updates))  # this rounds


def merged_tensors(
    base: Mapping[str, Tensor],
    loras: Sequence[LoraChoice],
    *,
    where: str | Path,
    dtype: torch.dtype | None = None,
) -> Mapping[str, Tensor]:
    """The tensors of a base model with LoRAs added, each computed when it is asked for.

    Args:
        base: name as in the plain model → tensor.
        loras: as in `merge_loras`, whose sums these are.
        where: the file or folder of `base`, for messages.
        dtype: of what comes back, rounded once; None leaves each tensor its own.

    Raises:
        UserError: as `merge_loras`, at once; as `in_dtype`, when a tensor is asked for.
    """
    hint = f"is {where} the base model that the LoRA was trained on?"
    known, shapes = fingerprint(base), on_meta(base)
    updates = [_read_update(choice, shapes, base=known, hint=hint) for choice in loras]
    layers = frozenset[str]().union(*(update.layers for update in updates))

    @torch.no_grad()
    def merged(layer: str) -> Tensor:
        name = f"{layer}.weight"
        weight = base[name]
        total = _updated(weight, layer, updates)
        return total if dtype else rounded(total, weight.dtype, name=name, where=where)

    makers = {name: partial(base.__getitem__, name) for name in base}
    makers |= {f"{layer}.weight": partial(merged, layer) for layer in layers}
    return in_dtype(LazyTensors(makers, meta=lambda: shapes), dtype, where=where)
