"""LoRA on its own: the file of a LoRA run, what it holds, and training on.

Such a file is ``{"module": {"model.diffusion_model.<layer>.matrix_A.0": …}, "lora": record}``.
Source of the method: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgm.checkpoint.find import Weights, find_lora, is_whole
from sgm.checkpoint.lora_formats import (
    LARGEST_ALPHA,
    NUM_PAIRS,
    LoraRecord,
    expected_matrices,
    is_alpha,
    is_foreign,
    lora_layers,
    other_alpha,
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
from sgm.config import LoraChoice
from sgm.errors import UserError

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)


_DEFAULT_ALPHA = 1.0  # of SAT's LoraMixin
_WHOLE_MODEL = "time_embed.0.weight", "transformer_blocks.0.norm1.norm.weight"  # SAT, diffusers


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


def read_lora(
    path: str | Path | Weights,
    *,
    alpha: float | None = None,
    tell: bool = True,
    option: str = "lora",
) -> tuple[dict[str, Tensor], LoraRecord]:
    """The matrices of a LoRA, mapped from disk, by their names in the network; and the record.

    Args:
        path: of SAT a run's folder (with ``latest``), the folder of an iteration, or a file; of
            diffusers or peft the folder or the file (see `to_sat_lora`). Older files of SAT hold
            the base model beside the matrices and have no record; what can be told of it is then
            taken from the tensors.
        alpha: lora_alpha where the file does not tell it. Without it the record of a file of
            diffusers or peft gets the rank, as diffusers itself takes it, and SAT's keeps None.
        tell: log it where the rank is taken.
        option: where the user gave the path, for messages.

    Raises:
        UserError: no such file, not a LoRA, a damaged record, or the file tells another alpha.
    """
    if alpha is not None and not is_alpha(alpha):
        raise UserError(f"lora_alpha={alpha} must be a number of at most {LARGEST_ALPHA:g}")
    found = find_lora(path, option=option)
    (source,), file = found.files, found.path
    tensors = source.tensors(wrapper="module")
    has_matrices = any(is_lora_matrix(name) for name in tensors)
    if not has_matrices and is_foreign(tensors):
        matrices, record, tells_alpha = to_sat_lora(
            tensors, file, metadata=source.read().metadata, alpha=alpha
        )
        if tell and alpha is None and not tells_alpha:
            logger.info("%s does not tell its alpha; its rank is taken, as diffusers does", file)
        return matrices, record
    if not has_matrices and any(name.endswith(_WHOLE_MODEL) for name in tensors):
        raise is_whole(file, option)
    base, matrices = sort_keys(tensors, file, kind="lora", option=option)
    if not matrices:
        raise UserError(
            f"{file} holds no LoRA of SAT format: no name has matrix_A or matrix_B (first key: "
            f"{next(iter(tensors))!r}); {option} must name a run that trained with lora_config"
        )
    state = source.read().state
    stored = state.get("lora")
    if not isinstance(stored, Mapping):
        stored = {"r": _rank(matrices), "base": fingerprint(base) if base else None}
    record = _checked_record(stored, file, rank=_rank(matrices))
    if alpha is None or alpha == record.lora_alpha:
        return matrices, record
    if record.lora_alpha is not None:
        raise other_alpha(file, record.lora_alpha, alpha)
    return matrices, replace(record, lora_alpha=alpha)


def is_sat_lora(lora: Weights) -> bool:
    """Whether a LoRA is of SAT format; else it is one of diffusers or peft.

    Raises:
        UserError: it cannot be read.
    """
    (file,) = lora.files
    return any(map(is_lora_matrix, file.tensors(wrapper="module")))


def _rank(matrices: Mapping[str, Tensor]) -> int:
    """The rank that the first matrix tells, A (r, in) or B (out, r); 0 for what is none."""
    name, matrix = next(iter(matrices.items()))
    return matrix.shape[0 if ".matrix_A." in name else 1] if matrix.ndim == 2 else 0


def _checked_record(record: Mapping[str, Any], path: Path, *, rank: int) -> LoraRecord:
    """The record of a file, if it is sensible and fits the matrices' rank; UserError if not."""
    r, alpha, layers, base = (record.get(field.name) for field in fields(LoraRecord))
    sound = {
        "r": type(r) is int and r == rank and rank >= 1,
        "lora_alpha": alpha is None or is_alpha(alpha),
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


def warn_of_other_base(record: LoraRecord, base: str, path: str | Path | Weights) -> None:
    """Log a warning where the LoRA in `path` was trained on another model than `base`."""
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
        return lora_layers(record.layer_range)
    return sorted({name.rsplit(".matrix_", 1)[0] for name in names})


def check_matrices(
    matrices: Mapping[str, Tensor],
    record: LoraRecord,
    weights: Mapping[str, Tensor],
    *,
    path: str | Path,
    hint: str,
    model: str = "the base model",
) -> None:
    """Check that the matrices of a LoRA are all there and fit the base model's `weights`.

    Args:
        matrices, record: as from `read_lora`.
        weights: name as in the plain model → tensor, which may be on the meta device.
        path: the LoRA's, for the message.
        hint: end of the message.
        model: what the message calls the model.

    Raises:
        UserError: names or shapes differ.
    """
    expected = expected_matrices(_layers(record, matrices), weights, record.r)
    check_fit(matrices, expected, path=path, hint=hint, model=model)


def check_whole_lora(matrices: Mapping[str, Tensor], record: LoraRecord, path: str | Path) -> None:
    """As `check_matrices` without the base model: query, key, value and dense map width to width.

    Raises:
        UserError: some are missing, unknown or of another shape than the first one tells.
    """
    width = next((m.shape[-1] for name, m in matrices.items() if ".matrix_A." in name), 0)
    weights = {}
    for layer in _layers(record, matrices):
        num_parts = NUM_PAIRS.get(layer.rpartition(".")[2], 1)
        weights[f"{layer}.weight"] = torch.empty(num_parts * width, width, device="meta")
    hint, model = "it is damaged, copy it again", f"any model of width {width}"
    check_matrices(matrices, record, weights, path=path, hint=hint, model=model)


def alpha_of(record: LoraRecord, path: str | Path) -> float:
    """lora_alpha of the LoRA in `path`; where it does not tell, SAT's default and a warning."""
    if record.lora_alpha is not None:
        return record.lora_alpha
    logger.warning("%s does not tell its lora_alpha; %g is taken", path, _DEFAULT_ALPHA)
    return _DEFAULT_ALPHA


def check_trained_lora(
    network: DiffusionTransformer, path: str | Path | Weights
) -> tuple[dict[str, Tensor], LoraRecord]:
    """Compare a LoRA that is to be trained on with the network, which may be on the meta device.

    Returns:
        What `read_lora` returns.

    Raises:
        UserError: the file is not a LoRA, or its rank, alpha or layers are not those of the
            network's ``lora_config``, or the network has no ``lora_config``.
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
    check_lora(network, matrices, path)
    return matrices, record


def load_lora(
    network: DiffusionTransformer, path: str | Path | Weights, *, base: str | None = None
) -> None:
    """Fill the LoRA matrices of a network with a ``lora_config``, to train on.

    The LoRA layers are added if they are not there yet. To be called before DeepSpeed takes the
    network over.

    Args:
        network: has a ``lora_config``.
        path: as in `read_lora`.
        base: as in `merge_loras`.

    Raises:
        UserError: as in `check_trained_lora`.
    """
    matrices, record = check_trained_lora(network, path)
    network.add_lora()
    fill_lora(network, matrices)
    warn_of_other_base(record, base or fingerprint(dict(network.named_parameters())), path)


_HINT = "load must name the base model that the LoRA was trained on, with its configuration"


@dataclass(frozen=True)
class LoraUpdate:
    """A LoRA to merge, from `path`.

    `factor`, that of B A, is scale · alpha / r; `layers` are those that the matrices change.
    """

    path: str | Path | Weights
    record: LoraRecord
    matrices: Mapping[str, Tensor]
    layers: frozenset[str]
    factor: float


def read_updates(
    loras: Iterable[LoraChoice], weights: Mapping[str, Tensor], *, hint: str = _HINT
) -> list[LoraUpdate]:
    """Read LoRAs and compare them with the weights that they are to change.

    Args:
        loras: as in `merge_loras`.
        weights: name as in the plain model → tensor, which may be on the meta device.
        hint: end of messages.

    Raises:
        UserError: one is not a LoRA, or one of another model.
    """
    updates = []
    for choice in loras:
        matrices, record = read_lora(choice.path)
        check_matrices(matrices, record, weights, path=choice.path, hint=hint)
        layers = frozenset(name.rsplit(".matrix_", 1)[0] for name in matrices)
        factor = choice.scale * alpha_of(record, choice.path) / record.r
        updates.append(LoraUpdate(choice.path, record, matrices, layers, factor))
    return updates


def _changed_layers(updates: Iterable[LoraUpdate]) -> frozenset[str]:
    return frozenset[str]().union(*(update.layers for update in updates))


def _updated(weight: Tensor, layer: str, updates: Iterable[LoraUpdate]) -> Tensor:
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
    updates = read_updates(loras, weights)
    merge_updates(network, updates, base=base or fingerprint(weights))


@torch.no_grad()
def merge_updates(
    network: DiffusionTransformer, updates: Sequence[LoraUpdate], *, base: str
) -> None:
    """As `merge_loras`, with LoRAs that `read_updates` has compared with the network."""
    weights = dict(network.named_parameters())
    if any(is_lora_matrix(name) for name in weights):
        raise RuntimeError("merge_loras: the network has LoRA layers of its own")
    network.merged_layers = _changed_layers(updates)
    for update in updates:
        warn_of_other_base(update.record, base, update.path)
    for layer in network.merged_layers:
        weight = weights[f"{layer}.weight"]
        weight.copy_(_updated(weight, layer, updates))  # this rounds


@torch.no_grad()
def replace_loras(
    network: DiffusionTransformer,
    loras: Sequence[LoraChoice],
    *,
    base_weights: Mapping[str, Tensor],
    base: str,
    device: str | torch.device,
) -> None:
    """Merge LoRAs in the place of those that were merged before, with the bytes of a fresh start.

    Args:
        network: its weights may be offloaded.
        loras: as in `merge_loras`; none restores the base model.
        base_weights: of the file that the network was loaded from, as `read_transformer` gives
            them.
        base: as in `merge_loras`.
        device: where sums are taken; that of a fresh start.

    Raises:
        UserError: a file is not a LoRA, or one of another model; nothing is changed then.
    """
    weights = dict(network.named_parameters())
    updates = read_updates(loras, weights)
    for update in updates:
        warn_of_other_base(update.record, base, update.path)
    changed = _changed_layers(updates)
    network.merged_layers |= changed  # also where this is interrupted
    for layer in network.merged_layers:
        name = f"{layer}.weight"
        dtype = weights[name].dtype
        weight = base_weights[name].to(device=device, dtype=dtype)
        weights[name].copy_(_updated(weight, layer, updates).to(dtype))
    network.merged_layers = changed


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
    updates = read_updates(loras, shapes, hint=hint)
    for update in updates:
        warn_of_other_base(update.record, known, update.path)

    @torch.no_grad()
    def merged(layer: str) -> Tensor:
        name = f"{layer}.weight"
        weight = base[name]
        total = _updated(weight, layer, updates)
        return total if dtype else rounded(total, weight.dtype, name=name, where=where)

    makers = {name: partial(base.__getitem__, name) for name in base}
    makers |= {f"{layer}.weight": partial(merged, layer) for layer in _changed_layers(updates)}
    return in_dtype(LazyTensors(makers, meta=lambda: shapes), dtype, where=where)
