"""Reads and checks LoRA files, merges LoRAs into a model, and loads a LoRA to continue training.

The file of a training run is
``{"module": {"model.diffusion_model.<layer>.matrix_A.0": …}, "lora": record}``.
The method is described in Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
section 4.1.
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


_DEFAULT_ALPHA = 1.0  # the default in SAT's LoraMixin
_HINT = "name the base model that the LoRA was trained on, with its configuration"
_WHOLE_MODEL = "time_embed.0.weight", "transformer_blocks.0.norm1.norm.weight"  # SAT, diffusers


def lora_record(network: DiffusionTransformer, base: str | None) -> dict[str, Any]:
    """Return the record of a network's LoRA as plain values, to save under the key ``lora``.

    Args:
        network: a network with a ``lora_config``.
        base: the `fingerprint` of the weights before training (the engine's `base_fingerprint`).
    """
    mixin = network.mixins["lora"]
    layer_range = [int(number) for number in mixin.layer_range]
    return asdict(LoraRecord(int(mixin.r), float(mixin.lora_alpha), layer_range, base))


def read_lora(
    path: str | Path | Weights, *, alpha: float | None = None, option: str = "lora"
) -> tuple[dict[str, Tensor], LoraRecord]:
    """Read a LoRA.

    Args:
        path: in SAT format: a training run's folder (with ``latest``), the folder of one of its
            iterations, or a file; from diffusers or peft: the folder or the file (see
            `to_sat_lora`). Older SAT files also contain the base model but no record; the rank
            and the base's fingerprint are then derived from the tensors.
        alpha: the lora_alpha to use if the file does not store one. Without `alpha`, the record of
            a LoRA from diffusers or peft gets the rank, as in diffusers. A SAT record gets None.
        option: the option that gave the path, for messages.

    Returns:
        The matrices under their names in the network, mapped from disk, and the record.

    Raises:
        UserError: the file is missing, not a LoRA, has a damaged record or stores another alpha.
    """
    if alpha is not None and not abs(alpha) <= LARGEST_ALPHA:  # also true for nan
        raise UserError(f"lora_alpha={alpha} must be a number of at most {LARGEST_ALPHA:g}")
    found = find_lora(path, option=option)
    if is_foreign(found.file.tensors()) and not is_sat_lora(found):
        return to_sat_lora(found, alpha)
    return _read_sat_lora(found, alpha)


def _read_sat_lora(found: Weights, alpha: float | None) -> tuple[dict[str, Tensor], LoraRecord]:
    """Return the matrices and the record in a file in SAT format."""
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
    """Return whether a LoRA is in SAT format (not in the format of diffusers or peft).

    Raises:
        UserError: the file cannot be read.
    """
    return any(map(is_lora_matrix, lora.file.tensors()))


def _warn_of_other_base(record: LoraRecord, base: str, path: str | Path | Weights) -> None:
    """Log a warning if the base model in `record` is known and is not the fingerprint `base`."""
    if record.base not in (None, base):
        logger.warning(
            "%s was trained on other weights than these (%s, not %s), so it may have little effect",
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
        matrices, record: from `read_lora`.
        weights: name in the model without LoRA → tensor, which may be on the meta device.
        path: the path of the LoRA, for the message.
        model: the name of the base model in the message.

    Raises:
        UserError: names or shapes differ.
    """
    expected = expected_matrices(_layers(record, matrices), weights, record.r)
    check_fit(matrices, expected, path=str(path), hint=_HINT, model=model)


def _layers(record: LoraRecord, names: Iterable[str]) -> list[str]:
    """Return the names of the layers that the LoRA changes."""
    if record.layer_range is not None:
        return lora_layers(record.layer_range)
    return sorted(set(map(_layer_of, names)))


def _layer_of(matrix: str) -> str:
    """Return the name of the layer that the LoRA matrix called `matrix` belongs to."""
    return matrix.rsplit(".matrix_", 1)[0]


def check_whole_lora(matrices: Mapping[str, Tensor], record: LoraRecord, path: str | Path) -> None:
    """Check that the matrices of a LoRA are complete and fit each other, without the base model.

    The query, key, value and dense layers are expected to be square (width, width); the width is
    taken from the first matrix A.

    Raises:
        UserError: matrices are missing, unknown or have a wrong shape.
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
    """Return the lora_alpha of `record`. Without one, log a warning and return SAT's default."""
    if record.lora_alpha is not None:
        return record.lora_alpha
    logger.warning("%s does not store its lora_alpha; %g is used", path, _DEFAULT_ALPHA)
    return _DEFAULT_ALPHA


def check_trained_lora(
    network: DiffusionTransformer, path: str | Path | Weights
) -> tuple[dict[str, Tensor], LoraRecord]:
    """Check that a network can continue the training of a LoRA.

    Args:
        network: the network, which may be on the meta device.
        path: as in `read_lora`.

    Returns:
        The same as `read_lora`.

    Raises:
        UserError: the file is not a LoRA, its rank, alpha or layers differ from the network's
            ``lora_config``, or the network has no ``lora_config``.
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
    """Load a LoRA into a network, to continue its training.

    LoRA layers are added if the network has none yet. DeepSpeed must not have wrapped the network.

    Args:
        network: a network with a ``lora_config``.
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
    """A LoRA to merge, read from `path`. It adds `factor` · B A; `factor` is scale · alpha / r."""

    path: str | Path | Weights
    record: LoraRecord
    matrices: Mapping[str, Tensor]
    factor: float


def read_updates(
    loras: Iterable[LoraChoice], weights: Mapping[str, Tensor], *, model: str = "the base model"
) -> list[LoraUpdate]:
    """Read LoRAs and check that they fit the weights that they change.

    Args:
        loras: the LoRAs with their strengths; paths as in `read_lora`.
        weights: name in the model without LoRA → tensor, which may be on the meta device.
        model: the name of the base model in messages.

    Raises:
        UserError: a file is not a LoRA, or is a LoRA for another model.
    """
    updates = []
    for choice in loras:
        matrices, record = read_lora(choice.path)
        check_matrices(matrices, record, weights, path=choice.path, model=model)
        factor = choice.scale * alpha_of(record, choice.path) / record.r
        updates.append(LoraUpdate(choice.path, record, matrices, factor))
    return updates


def _changed_layers(updates: Iterable[LoraUpdate], base: str) -> frozenset[str]:
    """Return the layers that LoRAs change; warn if a LoRA's base is not the fingerprint `base`."""
    for update in updates:
        _warn_of_other_base(update.record, base, update.path)
    return frozenset(_layer_of(name) for update in updates for name in update.matrices)


def _updated(weight: Tensor, layer: str, updates: Iterable[LoraUpdate]) -> Tensor:
    """Return a layer's `weight` (out, in) plus the updates, in float32 on the weight's device.

    If all updates are zero, `weight` itself is returned, because adding 0 would turn -0 into 0.
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

    The sum is computed in float32 and rounded once to the weight's dtype. A layer whose updates
    are all zero keeps every bit.

    Args:
        network: the base model; its weights may be offloaded.
        updates: from `read_updates`, which has checked that they fit the network.
        base: the `fingerprint` of the file that the weights came from. The fingerprint of the
            network itself differs if its weights were rounded to bfloat16.
        base_weights: the weights W, from `read_transformer`. Starting from W removes the LoRAs
            that are merged into the network now, and gives exactly the bytes of a network that was
            loaded anew with `updates`. None: the network's own weights are W.
        device: computes the sums with `base_weights`; must be the device on which a newly loaded
            network would compute them.
    """
    weights = dict(network.named_parameters())
    changed = _changed_layers(updates, base)
    network.merged_layers |= changed  # before the loop, which may be interrupted
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
    """Return the tensors of a base model with LoRAs merged; each is computed on access.

    Args:
        base: name in the model without LoRA → tensor.
        loras: as in `read_updates`; they are merged as in `merge_updates`.
        where: the file or folder of `base`, for messages.
        dtype: the dtype of the results, which are rounded once; None keeps each tensor's dtype.

    Raises:
        UserError: as in `read_updates`, immediately; as in `in_dtype`, on access to a tensor.
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
