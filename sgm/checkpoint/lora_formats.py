"""Reads LoRAs from diffusers and peft and converts them to SAT's format.

diffusers writes ``pytorch_lora_weights.safetensors`` with the settings as JSON in its metadata.
peft writes a folder with ``adapter_model.safetensors`` and ``adapter_config.json``. Both add
``alpha / r · B A`` to the weight of a layer, or ``alpha / √r · B A`` if `use_rslora` is set
(Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA").
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from sgm.checkpoint.table import to_sat
from sgm.checkpoint.weight_file import LONGEST_QUOTE, Weights, damaged, json_object, read_json
from sgm.errors import UserError, first_of

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)

METADATA_KEY = "lora_adapter_metadata"  # diffusers' settings in the header's metadata
BASE_KEY = "sat_base_fingerprint"  # also in the metadata; only in LoRAs trained by this code
DIFFUSERS_PREFIX = "transformer."
LARGEST_ALPHA = 1e9  # far above every sensible value
# The layers that SAT adds LoRA to → their number of matrix pairs (one each for q, k and v).
NUM_PAIRS = {"query_key_value": 3, "dense": 1}
_PARTS = ("to_q", "to_k", "to_v", "to_out.0")  # the same layers in diffusers
_CONFIG_FILE = "adapter_config.json"

_MATRIX = re.compile(
    r"(base_model\.model\.)?(transformer\.)?"
    r"(?P<layer>transformer_blocks\.(0|[1-9][0-9]{0,3})\.attn1\.(to_[qkv]|to_out\.0))"
    r"\.lora_(?P<kind>[AB])(\.default)?\.weight"
)

_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(ge=-LARGEST_ALPHA, le=LARGEST_ALPHA)]
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@validated(frozen=True, config=_STRICT)
class LoraRecord:
    """The settings of a LoRA, which are saved with its matrices.

    Args:
        r: the rank.
        lora_alpha: the update is ``lora_alpha / r · B A``; None in a file without a record.
        layer_range: indices of the blocks that have matrices; None in a file without a record.
        base: the `fingerprint` of the model that the LoRA was trained on; None if unknown.
    """

    r: _Rank
    lora_alpha: _Alpha | None = None
    layer_range: list[int] | None = None
    base: str | None = None


@validated(frozen=True, config=_STRICT)
class _AdapterSettings:
    """Settings of diffusers and peft. Pattern keys are names of layers, or the ends of names."""

    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    use_rslora: bool = False


Settings = TypeVar("Settings")


def checked_settings(
    kind: Callable[..., Settings], values: Mapping[Any, Any], where: str
) -> Settings:
    """Return the settings of a LoRA after checking them.

    Args:
        kind: the class of the settings, which depends on the format.
        values: name → value; names that the class does not have are ignored.
        where: the name in messages for the source of the settings.

    Raises:
        UserError: a value is missing or invalid.
    """
    try:
        return kind(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise damaged(where, f"has {name}={values.get(name)!r}") from None


def agreed_alpha(stored: float | None, given: float | None, path: Path) -> float | None:
    """Return the lora_alpha of the LoRA in `path`: `stored` in the file or, if None, `given`.

    Raises:
        UserError: `stored` and `given` differ.
    """
    if None not in (stored, given) and stored != given:
        raise UserError(
            f"{path} was trained with lora_alpha={stored:g}, not {given:g}; leave the option out "
            "(to change the strength, set it where the LoRA is merged)"
        )
    return given if stored is None else stored


# Settings that change the update: with them it is not alpha / r · B A, or has further terms.
_OTHER_UPDATES = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "layer_replication"),
)
# Initializations that also change the base model's weights; the matrices are not the whole update.
_OTHER_BEGINNINGS = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class _Pair:
    """The two matrices of a layer, and the alpha of its update ``alpha / r · B A``."""

    down: Tensor  # A (r, in)
    up: Tensor  # B (out, r)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def lora_layers(layer_range: Iterable[int]) -> list[str]:
    """Return the names of the layers that a LoRA changes in the blocks `layer_range`."""
    blocks = [f"transformer.layers.{number}.attention" for number in layer_range]
    return [f"{block}.{part}" for block in blocks for part in NUM_PAIRS]


def expected_matrices(
    layers: Iterable[str], weights: Mapping[str, Tensor], r: int
) -> dict[str, Tensor]:
    """Return the LoRA matrices that `layers` must have, as name → meta tensor.

    Args:
        layers: names of layers. Layers to which SAT does not add LoRA, or that are missing in
            `weights`, get no matrices.
        weights: name in the model without LoRA → tensor, which may be on the meta device.
        r: the rank.
    """
    expected = {}
    for layer in layers:
        num_pairs = NUM_PAIRS.get(layer.rpartition(".")[2])
        weight = weights.get(f"{layer}.weight")
        if num_pairs is None or weight is None or weight.ndim != 2:
            continue
        out_size, in_size = weight.shape
        for i in range(num_pairs):
            expected[f"{layer}.matrix_A.{i}"] = torch.empty(r, in_size, device="meta")
            expected[f"{layer}.matrix_B.{i}"] = torch.empty(out_size // num_pairs, r, device="meta")
    return expected


def lora_shapes(network: DiffusionTransformer) -> dict[str, Tensor]:
    """Return name → meta tensor of a network's LoRA matrices, even before LoRA layers are added."""
    mixin = network.mixins["lora"]
    weights = {n.replace(".original.", "."): weight for n, weight in network.named_parameters()}
    return expected_matrices(lora_layers(mixin.layer_range), weights, int(mixin.r))


def names_with_lora(network: DiffusionTransformer) -> list[str]:
    """Return the names that a network's weights have once its LoRA layers (if any) are added."""
    names = [name for name, _ in network.named_parameters()]
    if not network.lora_config:
        return names
    wrapped = tuple(f"{layer}." for layer in lora_layers(network.mixins["lora"].layer_range))
    beside = [
        ".original.".join(name.rsplit(".", 1)) if name.startswith(wrapped) else name
        for name in names
    ]
    return [*beside, *lora_shapes(network)]


def is_foreign(names: Iterable[str]) -> bool:
    """Return whether tensor `names` belong to a LoRA that was not written by SAT."""
    return any("lora_" in name or ".lora." in name for name in names)


def to_sat_lora(found: Weights, alpha: float | None) -> tuple[dict[str, Tensor], LoraRecord]:
    """Convert a LoRA of diffusers or peft to SAT's format.

    In SAT's format q, k, v and dense of each block have matrices, and all have the same rank.
    Layers that were not trained get zeros, and smaller ranks are padded with zeros. If layers have
    different strengths alpha / r, the difference is multiplied into B, in float32. All other
    values keep every bit.

    Args:
        found: the file; peft's ``adapter_config.json`` is read from the same folder.
        alpha: the alpha to use if the file stores none; None: the rank, as in diffusers.

    Returns:
        The matrices under their names in SAT, and the record.

    Raises:
        UserError: the file is damaged, is not a plain LoRA of CogVideoX's attention layers, or
            stores another alpha.
    """
    path, metadata = found.path, found.file.read().metadata
    layers = _named_matrices(found.file.tensors(), path)
    settings = _read_settings(path, metadata)
    alpha = agreed_alpha(settings.lora_alpha if settings else None, alpha, path)
    if alpha is None:
        logger.info("%s does not store its alpha; its rank is used, as in diffusers", path)
    pairs = _paired(layers, settings, path, alpha=alpha)
    rank = max(pair.rank for pair in pairs.values())
    common = _common_alpha(pairs.values(), rank)
    padded = {layer: _padded(pair, rank, common) for layer, pair in pairs.items()}
    first = next(iter(padded.values()))
    blocks = sorted({int(layer.split(".")[1]) for layer in padded})
    complete: dict[str, Tensor] = {}
    for layer in (f"transformer_blocks.{i}.attn1.{part}" for i in blocks for part in _PARTS):
        both = padded.get(layer) or map(torch.zeros_like, first)
        complete |= {f"{layer}.lora_{kind}.weight": m for kind, m in zip("AB", both, strict=True)}
    base = metadata.get(BASE_KEY, "")
    known = base if re.fullmatch(r"\w{1,64}", base) else None
    record = LoraRecord(rank, common, blocks, base=known)
    return dict(to_sat(complete, "lora", where=path)), record


def _named_matrices(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Return layer (its name in diffusers' transformer) → its matrices under "A" and "B".

    Raises:
        UserError: the file contains other tensors.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None or match["kind"] in layers.setdefault(match["layer"], {}):
            others.append(name)
        else:
            layers[match["layer"]][match["kind"]] = tensor
    if others:
        raise _not_plain(
            path,
            f"holds {len(others)} tensors that do not fit SAT's LoRA ({first_of(others)}), which "
            f"has one lora_A and one lora_B for {', '.join(_PARTS)} in each block of CogVideoX-2B",
        )
    return layers


def _not_plain(where: str | Path, what: str) -> UserError:
    """Return the error for an update that cannot be stored in SAT's LoRA format."""
    return UserError(
        f"{where} {what}; if the LoRA is for CogVideoX-2B, merge it in diffusers "
        "(load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained) and set load to the "
        "saved folder"
    )


def _read_settings(path: Path, metadata: Mapping[str, str]) -> _AdapterSettings | None:
    """Read the settings from the file's metadata or from ``adapter_config.json`` next to it.

    Returns:
        The settings, or None if neither contains any.

    Raises:
        UserError: the settings are damaged or do not describe a plain LoRA.
    """
    config = path.with_name(_CONFIG_FILE)
    if stored := metadata.get(METADATA_KEY):
        where = f"the metadata of {path}"
        values = json_object(stored, where)
    elif config.is_file():
        where, values = str(config), read_json(config)
    else:
        return None
    values = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in values.items()}
    others = [name for name in _OTHER_UPDATES if values.get(name)]
    if values.get("peft_type") not in (None, "LORA"):
        others.append("peft_type")
    if str(values.get("init_lora_weights")).lower().startswith(_OTHER_BEGINNINGS):
        others.append("init_lora_weights")
    if others:
        named = ", ".join(f"{name}={str(values[name])[:LONGEST_QUOTE]!r}" for name in others)
        raise _not_plain(where, f"has {named}, so it is not a plain LoRA")
    settings = checked_settings(_AdapterSettings, values, where)
    for key in (*(settings.rank_pattern or ()), *(settings.alpha_pattern or ())):
        # In peft the keys are regular expressions; a malicious one could take forever to match.
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise _not_plain(where, f"has the pattern {key!r}, which is not the name of a layer")
    return settings


def _by_pattern(patterns: Mapping[str, float] | None, layer: str, default: float) -> float:
    """Return the value of the first key in `patterns` that matches the layer's name.

    A key matches the full name or, if it has no leading ^, the end of the name after a dot.
    """
    for key, value in (patterns or {}).items():
        name = key.removeprefix("^")
        if layer == name or (name == key and layer.endswith(f".{name}")):
            return value
    return default


def _paired(
    layers: Mapping[str, Mapping[str, Tensor]],
    settings: _AdapterSettings | None,
    path: Path,
    *,
    alpha: float | None,
) -> dict[str, _Pair]:
    """Return layer → its two matrices, after checking their ranks against the settings.

    Args:
        layers: layer → its matrices under "A" and "B".
        settings: the settings that are stored with the LoRA.
        path: the file, for messages.
        alpha: the alpha of layers without their own value; None: the rank of the layer.

    Raises:
        UserError: a layer has only one matrix, or the rank of its matrices is wrong.
    """
    pairs = {}
    for layer, both in layers.items():
        down, up = both.get("A"), both.get("B")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2:
            raise damaged(path, f"has no two matrices (lora_A and lora_B) for {layer}")
        rank = down.shape[0]
        expected: float = rank
        own: float = rank if alpha is None else alpha
        if settings is not None:
            expected = _by_pattern(settings.rank_pattern, layer, settings.r)
            own = _by_pattern(settings.alpha_pattern, layer, own)
            own *= math.sqrt(rank) if settings.use_rslora else 1
        if not rank or up.shape[1] != rank or rank != expected:
            raise damaged(
                path,
                f"has matrices for {layer} of {list(down.shape)} and {list(up.shape)}, which do "
                f"not have rank {expected}",
            )
        pairs[layer] = _Pair(down, up, own)
    return pairs


def _common_alpha(pairs: Iterable[_Pair], rank: int) -> float:
    """Return the alpha that, at the largest `rank`, is right for most layers; 0 if all have 0."""
    counts = Counter((pair.alpha, pair.rank) for pair in pairs if pair.alpha)
    if not counts:
        return 0.0
    (alpha, own_rank), _ = counts.most_common(1)[0]
    return float(alpha if own_rank == rank else alpha * rank / own_rank)


def _padded(pair: _Pair, rank: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) that give the pair's update with rank and `alpha`."""
    down, up = pair.down, pair.up
    if alpha and not math.isclose(pair.alpha * rank, alpha * pair.rank, rel_tol=1e-12):
        up = up.float() * (pair.alpha / pair.rank / (alpha / rank))
    missing = rank - pair.rank
    if missing:
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        up = torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1)
    return down, up
