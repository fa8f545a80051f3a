"""LoRA files of training runs: reading, checking, merging into a model, and training on.

Such a file is ``{"module": {"model.diffusion_model.<layer>.matrix_A.0": …}, "lora": record}``.
Source of the method: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgm.checkpoint.find import find_lora, is_whole, no_sat_format
from sgm.checkpoint.lora_formats import (
    LARGEST_ALPHA,
    NUM_PAIRS,
    LoraRecord,
    agreed_alpha,
    checked_settings,
    expected_matrices,
    is_foreign,
    lora_layers,
    to_sat_lora,
)
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.tensors import LazyTensors, in_dtype, on_meta, rounded
from sgm.checkpoint.transformer import (
    check_lora,
    fill_lora,
    fingerprint,
    is_lora_matrix,
    sort_keys,
)
from sgm.checkpoint.weight_file import Weights, damaged
from sgm.config import LoraChoice
from sgm.errors import UserError

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)


_DEFAULT_ALPHA = 1.0  # of SAT's LoraMixin
_HINT = "name the base model that the LoRA was trained on, with its configuration"
_WHOLE_MODEL = "time_embed.0.weight", "transformer_blocks.0.norm1.norm.weight"  # SAT, diffusers


def lora_record(network: DiffusionTransformer, base: str | None) -> dict[str, Any]:
    """The record of a network with LoRA, as plain values, for the key ``lora`` of its file.

    Args:
        network: has a ``lora_config``.
        base: `fingerprint` of the weights before training, as the engine's `base_fingerprint`.
    """
    mixin = network.mixins["lora"]
    layer_range = [int(number) for number in mixin.layer_range]
    return asdict(LoraRecord(int(mixin.r), float(mixin.lora_alpha), layer_range, base))


def read_lora(
    path: str | Path | Weights, *, alpha: float | None = None, option: str = "lora"
) -> tuple[dict[str, Tensor], LoraRecord]:
    """Read a LoRA: its matrices by their names in the network, mapped from disk, and its record.

    Args:
        path: of SAT a run's folder (with ``latest``), the folder of an iteration, or a file; of
            diffusers or peft the folder or the file (see `to_sat_lora`). Older files of SAT hold
            the base model beside the matrices and have no record; its values then come from the
            tensors where they show them.
        alpha: lora_alpha if the file does not store it. Without it the record of a file of
            diffusers or peft gets the rank, as in diffusers, and SAT's keeps None.
        option: the option that gave the path, for messages.

    Raises:
        UserError: no such file, not a LoRA, a damaged record, or the file stores another alpha.
    """
    if alpha is not None and not abs(alpha) <= LARGEST_ALPHA:  # also true for nan
        raise UserError(f"lora_alpha={alpha} must be a number of at most {LARGEST_ALPHA:g}")
    found = find_lora(path, option=option)
    if is_foreign(found.file.tensors()) and not is_sat_lora(found):
        return to_sat_lora(found, alpha)
    return _read_sat_lora(found, alpha)


def _read_sat_lora(found: Weights, alpha: float | None) -> tuple[dict[str, Tensor], LoraRecord]:
    """The matrices and the record in a file of SAT."""
    base, matrices = sort_keys(found)
    if not matrices:
        if any(name.endswith(_WHOLE_MODEL) for name in base):
            raise is_whole(found.path, found.option)
        raise no_sat_format(found, "lora")
    name, matrix = next(iter(matrices.items()))  # A (r, in) or B (out, r)
    rank = matrix.shape[0 if ".matrix_A." in name else 1] if matrix.ndim == 2 else 0
    stored = found.file.read().state.get("lora")
    if not isinstance(stored, Mapping):
        stored = {"r": rank, "base": fingerprint(base) if base else None}
    where = f"{found.path}: the record of its LoRA"
    record = checked_settings(LoraRecord, stored, where)
    if record.r != rank:
        raise damaged(where, f"has r={record.r}")
    return matrices, replace(record, lora_alpha=agreed_alpha(record.lora_alpha, alpha, found.path))


def is_sat_lora(lora: Weights) -> bool:
    """Whether a LoRA is of SAT format, and not of diffusers or peft.

    Raises:
        UserError: it cannot be read.
    """
    return any(map(is_lora_matrix, lora.file.tensors()))


def _warn_of_other_base(record: LoraRecord, base: str, path: str | Path | Weights) -> None:
    """Log a warning if the LoRA in `path` was trained on another model than `base`."""
    if record.base not in (None, base):
        logger.warning(
            "%s was trained on other weights than these (%s, not %s), so its effect may not show",
            path,
            record.base,
            base,
        )


def check_matrices(
    matrices: Mapping[str, Tensor],
    record: LoraRecord,
    weights: Mapping[str, Tensor],
    *,
    path: str | Path | Weights,
    model: str = "the base model",
) -> None:
    """Check that the matrices of a LoRA are complete and fit the base model's `weights`.

    Args:
        matrices, record: as from `read_lora`.
        weights: name as in the plain model → tensor, which may be on the meta device.
        path: the LoRA's, for the message.
        model: what the message calls the base model.

    Raises:
        UserError: names or shapes differ.
    """
    expected = expected_matrices(_layers(record, matrices), weights, record.r)
    check_fit(matrices, expected, path=str(path), hint=_HINT, model=model)


def _layers(record: LoraRecord, names: Iterable[str]) -> list[str]:
    """Names of the layers that the LoRA changes."""
    if record.layer_range is not None:
        return lora_layers(record.layer_range)
    return sorted(set(map(_layer_of, names)))


def _layer_of(matrix: str) -> str:
    """The name of the layer that a matrix of this name belongs to."""
    return matrix.rsplit(".matrix_", 1)[0]


def check_whole_lora(matrices: Mapping[str, Tensor], record: LoraRecord, path: str | Path) -> None:
    """Check a LoRA as `check_matrices` does, without the base model.

    Query, key, value and dense are expected to map width to width, which the first matrix A gives.

    Raises:
        UserError: matrices are missing, unknown or of another shape.
    """
    downs = [m for name, m in matrices.items() if ".matrix_A." in name and m.ndim == 2]
    width = downs[0].shape[1] if downs else 0
    layers, weights = _layers(record, matrices), {}
    for layer in layers:
        num_parts = NUM_PAIRS.get(layer.rpartition(".")[2], 1)
        weights[f"{layer}.weight"] = torch.empty(num_parts * width, width, device="meta")
    expected = expected_matrices(layers, weights, record.r)
    model = f"any model of width {width}"
    check_fit(matrices, expected, path=str(path), hint="download or copy it again", model=model)


def alpha_of(record: LoraRecord, path: str | Path | Weights) -> float:
    """lora_alpha of the LoRA in `path`; if it is not stored, SAT's default, with a warning."""
    if record.lora_alpha is not None:
        return record.lora_alpha
    logger.warning("%s does not store its lora_alpha; %g is used", path, _DEFAULT_ALPHA)
    return _DEFAULT_ALPHA


def check_trained_lora(
    network: DiffusionTransformer, path: str | Path | Weights
) -> tuple[dict[str, Tensor], LoraRecord]:
    """Compare a LoRA with the network that trains on from it, which may be on the meta device.

    Returns:
        The same as `read_lora`.

    Raises:
        UserError: the file is not a LoRA, or its rank, alpha or layers are not those of the
            network's ``lora_config``, or the network has no ``lora_config``.
    """
    matrices, record = read_lora(path)
    if network.lora_config:
        mixin = network.mixins["lora"]
        for name in ("r", "lora_alpha"):
            trained, configured = getattr(record, name), getattr(mixin, name)
            if trained is not None and trained != configured:
                raise UserError(
                    f"{path} was trained with {name}={trained:g}, but lora_config says "
                    f"{configured:g}; set {name}: {trained:g} there"
                )
    check_lora(network, matrices, path)
    return matrices, record


def load_lora(
    network: DiffusionTransformer, path: str | Path | Weights, *, base: str | None = None
) -> None:
    """Fill the LoRA matrices of a network with a ``lora_config``, to train on.

    The LoRA layers are added if they are missing. DeepSpeed must not have wrapped the network yet.

    Args:
        network: has a ``lora_config``.
        path: as in `read_lora`.
        base: as in `merge_updates`; None computes it from the network.

    Raises:
        UserError: as in `check_trained_lora`.
    """
    matrices, record = check_trained_lora(network, path)
    network.add_lora()
    fill_lora(network, matrices)
    _warn_of_other_base(record, base or fingerprint(dict(network.named_parameters())), path)


@dataclass(frozen=True)
class LoraUpdate:
    """A LoRA to merge, from `path`. `factor`, that of B A, is scale · alpha / r."""

    path: str | Path | Weights
    record: LoraRecord
    matrices: Mapping[str, Tensor]
    factor: float


def read_updates(
    loras: Iterable[LoraChoice], weights: Mapping[str, Tensor], *, model: str = "the base model"
) -> list[LoraUpdate]:
    """Read LoRAs and compare them with the weights that they change.

    Args:
        loras: the LoRAs with their strengths; paths as in `read_lora`.
        weights: name as in the plain model → tensor, which may be on the meta device.
        model: what messages call the base model.

    Raises:
        UserError: one is not a LoRA, or a LoRA of another model.
    """
    updates = []
    for choice in loras:
        matrices, record = read_lora(choice.path)
        check_matrices(matrices, record, weights, path=choice.path, model=model)
        factor = choice.scale * alpha_of(record, choice.path) / record.r
        updates.append(LoraUpdate(choice.path, record, matrices, factor))
    return updates


def _changed_layers(updates: Iterable[LoraUpdate], base: str) -> frozenset[str]:
    """The layers that LoRAs change. A LoRA of another model than `base` gives a warning."""
    for update in updates:
        _warn_of_other_base(update.record, base, update.path)
    return frozenset(_layer_of(name) for update in updates for name in update.matrices)


def _updated(weight: Tensor, layer: str, updates: Iterable[LoraUpdate]) -> Tensor:
    """The sum of a layer's weight (out, in) and the updates, in float32 on the weight's device.

    If all updates are zero, it is the weight itself: adding 0 would turn -0 into 0.
    """
    total = None
    for update in updates:
        if f"{layer}.matrix_A.0" not in update.matrices or not update.factor:
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
def merge_updates(
    network: DiffusionTransformer,
    updates: Sequence[LoraUpdate],
    *,
    base: str,
    base_weights: Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Add LoRAs to the weights of a network without LoRA layers: W + Σ scale · alpha / r · B A.

    The sum is computed in float32 and rounded once to the weight's type. Matrices that are zero
    leave every bit as it was.

    Args:
        network: the base model; its weights may be offloaded.
        updates: from `read_updates`, which has compared them with the network.
        base: `fingerprint` of the file that the weights came from. The network's own is another
            one if the weights were rounded to bfloat16 since.
        base_weights: the weights W, from `read_transformer`. They replace the LoRAs that are merged
            in the network, so that it gets the bytes of a fresh start. None: the network's own.
        device: computes the sums with `base_weights`; it must be that of a fresh start.
    """
    weights = dict(network.named_parameters())
    changed = _changed_layers(updates, base)
    network.merged_layers |= changed  # also where this is interrupted
    for layer in network.merged_layers:
        name = f"{layer}.weight"
        weight = own = weights[name]
        if base_weights is not None:
            own = base_weights[name].to(device=device, dtype=weight.dtype)
        weight.copy_(_updated(own, layer, updates).to(weight.dtype))
    network.merged_layers = changed


def merged_tensors(
    base: Mapping[str, Tensor],
    loras: Sequence[LoraChoice],
    *,
    where: str | Path,
    dtype: torch.dtype | None = None,
) -> Mapping[str, Tensor]:
    """The tensors of a base model with LoRAs merged, each computed on access.

    Args:
        base: name as in the plain model → tensor.
        loras: as in `read_updates`; the sums are those of `merge_updates`.
        where: the file or folder of `base`, for messages.
        dtype: of the results, rounded once; None keeps the type of each tensor.

    Raises:
        UserError: as in `read_updates`, at once; as in `in_dtype`, on access to a tensor.
    """
    shapes = on_meta(base)
    updates = read_updates(loras, shapes, model=str(where))
    changed = _changed_layers(updates, fingerprint(base))

    @torch.no_grad()
    def merged(layer: str) -> Tensor:
        name = f"{layer}.weight"
        weight = base[name]
        total = _updated(weight, layer, updates)
        return total if dtype else rounded(total, weight.dtype, name=name, where=where)

    makers = {name: partial(base.__getitem__, name) for name in base}
    makers |= {f"{layer}.weight": partial(merged, layer) for layer in changed}
    return in_dtype(LazyTensors(makers, meta=shapes), dtype, where=where)
