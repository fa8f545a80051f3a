"""LoRA on its own: the file of a LoRA run, and its two uses, merging and training on.

Such a file is ``{"module": {"model.diffusion_model.<layer>.matrix_A.0": …}, "lora": record}``.
Source of the method: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgm.checkpoint.fit import check_fit
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.transformer import (
    fill_lora,
    find_transformer_file,
    fingerprint,
    is_lora_matrix,
    sort_keys,
)
from sgm.errors import UserError

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)

_DEFAULT_ALPHA = 1.0  # of SAT's LoraMixin
_LARGEST_ALPHA = 1e9  # no sensible one comes near
# The layers that SAT wraps, and into how many parts it cuts their outputs: q, k and v have a pair
# of matrices each.
_NUM_PAIRS = {"query_key_value": 3, "dense": 1}
_HINT = "load must name the base model that the LoRA was trained on, with its configuration"


@dataclass(frozen=True)
class LoraRecord:
    """What a LoRA's matrices do not say themselves.

    Args:
        r: rank.
        lora_alpha: the update is ``lora_alpha / r · B A``; None in a file without a record.
        layer_range: numbers of the blocks that have matrices; None in a file without a record.
        base: `fingerprint` of the model it was trained on; None where that is not known.
    """

    r: int
    lora_alpha: float | None
    layer_range: list[int] | None
    base: str | None


def lora_record(network: DiffusionTransformer, base: str | None) -> dict[str, Any]:
    """The record of a network with LoRA, as plain values, for the key ``lora`` of its file.

    Args:
        network: has a ``lora_config``.
        base: `fingerprint` of the weights before training, as the engine's `base_fingerprint`.
    """
    mixin = network.mixins["lora"]
    record = LoraRecord(
        r=int(mixin.r),
        lora_alpha=float(mixin.lora_alpha),
        layer_range=[int(number) for number in mixin.layer_range],
        base=base,
    )
    return asdict(record)


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], LoraRecord]:
    """The matrices of a LoRA, mapped from disk, by their names in the network; and the record.

    Args:
        path: a run's folder (with ``latest``), the folder of an iteration, or a file. Older files
            hold the base model beside the matrices and have no record; what can be told of it is
            then taken from the tensors.

    Raises:
        UserError: no such file, not a LoRA, or a damaged record.
    """
    path = find_transformer_file(path, key="lora")
    state = read_checkpoint(path)
    tensors = tensors_of(state, path, wrapper="module")
    base, matrices = sort_keys(tensors, path, key="lora")
    if not matrices:
        if "time_embed.0.weight" in base:
            raise UserError(f"{path} is a whole model, not a LoRA; name it in load instead of lora")
        raise UserError(
            f"{path} holds no LoRA of SAT format: no name has matrix_A or matrix_B (first key: "
            f"{next(iter(tensors))!r}); lora must name a run that trained with lora_config"
        )
    record = state.get("lora")
    if not isinstance(record, Mapping):
        record = {"r": _rank(matrices), "base": fingerprint(base) if base else None}
    return matrices, _checked_record(record, path, rank=_rank(matrices))


def _rank(matrices: Mapping[str, Tensor]) -> int:
    """The rank that the first matrix tells, A (r, in) or B (out, r); 0 for what is none."""
    name, matrix = next(iter(matrices.items()))
    return matrix.shape[0 if ".matrix_A." in name else 1] if matrix.ndim == 2 else 0


def _checked_record(record: Mapping[str, Any], path: Path, *, rank: int) -> LoraRecord:
    """The record of a file, if it is sensible and fits the matrices' rank; UserError if not."""
    r, alpha, layers, base = (record.get(field.name) for field in fields(LoraRecord))
    sound = {
        "r": type(r) is int and r == rank and rank >= 1,
        "lora_alpha": alpha is None
        or (type(alpha) in (int, float) and abs(alpha) <= _LARGEST_ALPHA),
        "layer_range": layers is None
        or (isinstance(layers, list) and all(type(number) is int for number in layers)),
        "base": base is None or isinstance(base, str),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise UserError(
                f"{path}: its record of the LoRA has {name}={record.get(name)!r}; the file is "
                "damaged, copy it again or take another checkpoint of the run"
            )
    return LoraRecord(rank, None if alpha is None else float(alpha), layers, base)


def _warn_of_other_base(record: LoraRecord, base: str, path: str | Path) -> None:
    if record.base not in (None, base):
        logger.warning(
            "%s was trained on other weights than these (%s, not %s); what it learned may not show",
            path,
            record.base,
            base,
        )


def _layers(record: LoraRecord, names: Iterable[str]) -> list[str]:
    """Names of the layers that the LoRA changes."""
    if record.layer_range is not None:
        blocks = [f"transformer.layers.{number}.attention" for number in record.layer_range]
        return [f"{block}.{part}" for block in blocks for part in _NUM_PAIRS]
    return sorted({name.rsplit(".matrix_", 1)[0] for name in names})


def _expected_matrices(
    layers: Iterable[str], weights: Mapping[str, Tensor], r: int
) -> dict[str, Tensor]:
    """Name → meta tensor of the shape that each matrix must have, for layers of the network."""
    expected = {}
    for layer in layers:
        num_pairs = _NUM_PAIRS.get(layer.rpartition(".")[2])
        weight = weights.get(f"{layer}.weight")
        if num_pairs is None or weight is None:  # its matrices are unknown keys then
            continue
        out_size, in_size = weight.shape
        for i in range(num_pairs):
            expected[f"{layer}.matrix_A.{i}"] = torch.empty(r, in_size, device="meta")
            expected[f"{layer}.matrix_B.{i}"] = torch.empty(out_size // num_pairs, r, device="meta")
    return expected


@torch.no_grad()
def merge_lora(
    network: DiffusionTransformer,
    path: str | Path,
    *,
    base: str | None = None,
    scale: float = 1.0,
) -> None:
    """Add a LoRA to the weights of a network without LoRA layers: W + scale · alpha / r · B A.

    The sum is taken in float32 on the weight's device and rounded once to its type. Matrices that
    are zero leave every bit as it was.

    Args:
        network: the base model.
        path: as in `read_lora`.
        base: `fingerprint` of the file that the weights came from; None takes the network's own,
            which is another one if the weights have been rounded to bfloat16 since.
        scale: strength of the LoRA; 1 is as trained.

    Raises:
        UserError: the file is not a LoRA, or one of another model.
    """
    matrices, record = read_lora(path)
    weights = dict(network.named_parameters())
    if any(is_lora_matrix(name) for name in weights):
        raise RuntimeError("merge_lora: the network has LoRA layers of its own")
    expected = _expected_matrices(_layers(record, matrices), weights, record.r)
    check_fit(matrices, expected, path=path, hint=_HINT)
    _warn_of_other_base(record, base or fingerprint(weights), path)
    alpha = record.lora_alpha
    if alpha is None:
        logger.warning("%s does not tell its lora_alpha; %g is taken", path, _DEFAULT_ALPHA)
        alpha = _DEFAULT_ALPHA
    for layer in {name.rsplit(".matrix_", 1)[0]: None for name in expected}:
        weight = weights[f"{layer}.weight"]
        products = []
        for i in range(_NUM_PAIRS[layer.rpartition(".")[2]]):
            down, up = (
                matrices[f"{layer}.matrix_{kind}.{i}"].to(weight.device, torch.float32)
                for kind in "AB"
            )  # (r, in), (out / parts, r)
            products.append(up @ down)
        update = torch.cat(products)  # (out, in)
        if update.any():  # else -0 would become 0
            weight.copy_(weight.float() + scale * alpha / record.r * update)


def load_lora(network: DiffusionTransformer, path: str | Path, *, base: str | None = None) -> None:
    """Fill the LoRA matrices of a network with a ``lora_config``, to train on.

    The LoRA layers are added if they are not there yet. To be called before DeepSpeed takes the
    network over.

    Args:
        network, path, base: as in `merge_lora`.

    Raises:
        UserError: the file is not a LoRA, or its rank, alpha or layers are not those of
            `lora_config`.
    """
    if not network.lora_config:
        raise UserError(
            f"{path} is to be trained on, but the configuration has no lora_config; add it"
        )
    matrices, record = read_lora(path)
    mixin = network.mixins["lora"]
    for name in ("r", "lora_alpha"):
        trained, configured = getattr(record, name), getattr(mixin, name)
        if trained is not None and trained != configured:
            raise UserError(
                f"{path} was trained with {name}={trained:g}, but lora_config says "
                f"{configured:g}; set {name}: {trained:g} there"
            )
    network.add_lora()
    fill_lora(network, matrices, path)
    _warn_of_other_base(record, base or fingerprint(dict(network.named_parameters())), path)
