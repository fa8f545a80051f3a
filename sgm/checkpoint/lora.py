"""LoRA on its own: the file of a LoRA run, what it holds, and training on.

Such a file is ``{"module": {"model.diffusion_model.<layer>.matrix_A.0": …}, "lora": record}``.
Source of the method: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgm.checkpoint.lora_formats import (
    LARGEST_ALPHA,
    NUM_PAIRS,
    LoraRecord,
    find_foreign_file,
    is_alpha,
    is_foreign,
    other_alpha,
    to_sat_lora,
)
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.tensors import LazyTensors, in_dtype, on_meta, rounded
from sgm.checkpoint.transformer import (
    fill_lora,
    find_transformer_file,
    fingerprint,
    is_lora_matrix,
    sort_keys,
)
from sgm.config import LoraChoice
from sgm.errors import UserError

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

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
    path: str | Path, *, alpha: float | None = None, tell: bool = True, option: str = "lora"
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
    file = find_lora_file(path, option=option)
    state = read_checkpoint(file)
    tensors = tensors_of(state, file, wrapper="module")
    has_matrices = any(is_lora_matrix(name) for name in tensors)
    if not has_matrices and is_foreign(tensors):
        matrices, record, tells_alpha = to_sat_lora(tensors, file, alpha=alpha)
        if tell and alpha is None and not tells_alpha:
            logger.info("%s does not tell its alpha; its rank is taken, as diffusers does", file)
        return matrices, record
    if not has_matrices and any(name.endswith(_WHOLE_MODEL) for name in tensors):
        raise _is_whole(file, option)
    base, matrices = sort_keys(tensors, file, kind="lora", option=option)
    if not matrices:
        raise UserError(
            f"{file} holds no LoRA of SAT format: no name has matrix_A or matrix_B (first key: "
            f"{next(iter(tensors))!r}); {option} must name a run that trained with lora_config"
        )
    stored = state.get("lora")
    if not isinstance(stored, Mapping):
        stored = {"r": _rank(matrices), "base": fingerprint(base) if base else None}
    record = _checked_record(stored, file, rank=_rank(matrices))
    if alpha is None or alpha == record.lora_alpha:
        return matrices, record
    if record.lora_alpha is not None:
        raise other_alpha(file, record.lora_alpha, alpha)
    return matrices, replace(record, lora_alpha=alpha)


def is_sat_lora(path: str | Path, *, option: str = "lora") -> bool:
    """Whether the LoRA in `path` is of SAT format; else it is one of diffusers or peft.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = find_lora_file(path, option=option)
    return any(map(is_lora_matrix, tensors_of(read_checkpoint(file), file, wrapper="module")))


def find_lora_file(path: str | Path, *, option: str = "lora") -> Path:
    """The file that a LoRA's `path` means: itself, or in a folder of SAT, diffusers or peft.

    Raises:
        UserError: there is none.
    """
    folder = Path(os.path.expanduser(path))
    file = find_foreign_file(folder)
    if file is not None:
        return file
    if os.path.isfile(folder / "model_index.json") or os.path.isfile(folder / "config.json"):
        raise _is_whole(path, option)
    return find_transformer_file(path, kind="lora", option=option)


def _is_whole(path: str | Path, option: str) -> UserError:
    hint = f"{option} must name a LoRA, or a run that trained one"
    if option == "lora":  # of a command that takes a whole model too
        hint = "name it in load, a LoRA in lora"
    return UserError(f"{path} is a whole model, not a LoRA; {hint}")


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


def warn_of_other_base(record: LoraRecord, base: str, path: str | Path) -> None:
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
        blocks = [f"transformer.layers.{number}.attention" for number in record.layer_range]
        return [f"{block}.{part}" for block in blocks for part in NUM_PAIRS]
    return sorted({name.rsplit(".matrix_", 1)[0] for name in names})


def _expected_matrices(
    layers: Iterable[str], weights: Mapping[str, Tensor], r: int
) -> dict[str, Tensor]:
    """Name → meta tensor of the shape that each matrix must have, for layers of the network."""
    expected = {}
    for layer in layers:
        num_pairs = NUM_PAIRS.get(layer.rpartition(".")[2])
        weight = weights.get(f"{layer}.weight")
        # Else its matrices are unknown keys.
        if num_pairs is None or weight is None or weight.ndim != 2:
            continue
        out_size, in_size = weight.shape
        for i in range(num_pairs):
            expected[f"{layer}.matrix_A.{i}"] = torch.empty(r, in_size, device="meta")
            expected[f"{layer}.matrix_B.{i}"] = torch.empty(out_size // num_pairs, r, device="meta")
    return expected


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
    expected = _expected_matrices(_layers(record, matrices), weights, record.r)
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


def load_lora(network: DiffusionTransformer, path: str | Path, *, base: str | None = None) -> None:
    """Fill the LoRA matrices of a network with a ``lora_config``, to train on.

    The LoRA layers are added if they are not there yet. To be called before DeepSpeed takes the
    network over.

    Args:
        network: has a ``lora_config``.
        path: as in `read_lora`.
        base: as in `merge_loras`.

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
    warn_of_other_base(record, base or fingerprint(dict(network.named_parameters())), path)


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
