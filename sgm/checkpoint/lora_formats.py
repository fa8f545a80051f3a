"""LoRAs of diffusers and peft: their files and settings, and their conversion to SAT's format.

diffusers writes ``pytorch_lora_weights.safetensors`` with the settings as JSON in its metadata,
peft a folder with ``adapter_model.safetensors`` and ``adapter_config.json``. In both, the update of
a layer is ``alpha / r · B A``, or with `use_rslora` ``alpha / √r · B A`` (Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA").
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

METADATA_KEY = "lora_adapter_metadata"  # of the safetensors header, where diffusers puts settings
BASE_KEY = "sat_base_fingerprint"  # beside it, of LoRAs that were trained here
DIFFUSERS_PREFIX = "transformer."
LARGEST_ALPHA = 1e9  # no sensible value comes near
# The layers that SAT wraps, and the number of parts of their outputs: q, k and v have a pair of
# matrices each.
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
    """The settings of a LoRA that its matrices do not show.

    Args:
        r: rank.
        lora_alpha: the update is ``lora_alpha / r · B A``; None in a file without a record.
        layer_range: numbers of the blocks that have matrices; None in a file without a record.
        base: `fingerprint` of the model it was trained on; None if it is not known.
    """

    r: _Rank
    lora_alpha: _Alpha | None = None
    layer_range: list[int] | None = None
    base: str | None = None


@validated(frozen=True, config=_STRICT)
class _AdapterSettings:
    """Settings of diffusers and peft. The keys of patterns are names of layers, or their ends."""

    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    use_rslora: bool = False


Settings = TypeVar("Settings")


def checked_settings(
    kind: Callable[..., Settings], values: Mapping[Any, Any], where: str
) -> Settings:
    """The settings of a LoRA, of the class for its format.

    Args:
        kind: the class.
        values: name → value; names that the class does not have are left out.
        where: what messages call the place of the settings.

    Raises:
        UserError: a value is missing or not valid.
    """
    try:
        return kind(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise damaged(where, f"has {name}={values.get(name)!r}") from None


def agreed_alpha(stored: float | None, given: float | None, path: Path) -> float | None:
    """lora_alpha of the LoRA in `path`: the one that the file stores, or else the given one.

    Raises:
        UserError: the file stores another one than the given.
    """
    if None not in (stored, given) and stored != given:
        raise UserError(
            f"{path} was trained with lora_alpha={stored:g}, not {given:g}; leave the option out, "
            "a strength is given when the LoRA is merged"
        )
    return given if stored is None else stored


# Settings with which an update is not alpha / r · B A, or not only that.
_OTHER_UPDATES = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "layer_replication"),
)
# Ways to begin that change the base model's weights too, so the matrices alone are not the update.
_OTHER_BEGINNINGS = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class _Pair:
    """The two matrices of a layer, and the alpha with which its update is alpha / r · B A."""

    down: Tensor  # A (r, in)
    up: Tensor  # B (out, r)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def lora_layers(layer_range: Iterable[int]) -> list[str]:
    """Names of the layers that a LoRA of these blocks changes."""
    blocks = [f"transformer.layers.{number}.attention" for number in layer_range]
    return [f"{block}.{part}" for block in blocks for part in NUM_PAIRS]


def expected_matrices(
    layers: Iterable[str], weights: Mapping[str, Tensor], r: int
) -> dict[str, Tensor]:
    """Name → meta tensor of the shape that each matrix must have, for layers of the network.

    Args:
        layers: their names; those that SAT does not wrap, or that are not in `weights`, get no
            matrices.
        weights: name as in the plain model → tensor, which may be on the meta device.
        r: rank.
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
    """Name → meta tensor of a network's LoRA matrices; its LoRA layers may not be added yet."""
    mixin = network.mixins["lora"]
    weights = {n.replace(".original.", "."): weight for n, weight in network.named_parameters()}
    return expected_matrices(lora_layers(mixin.layer_range), weights, int(mixin.r))


def names_with_lora(network: DiffusionTransformer) -> list[str]:
    """Names of a network's weights after its LoRA layers, if it has any, are added."""
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
    """Whether weights of these names are a LoRA of diffusers, peft or another code than SAT."""
    return any("lora_" in name or ".lora." in name for name in names)


def to_sat_lora(found: Weights, alpha: float | None) -> tuple[dict[str, Tensor], LoraRecord]:
    """Convert a LoRA of diffusers or peft to SAT's format: all of q, k, v and dense, of one rank.

    Layers that were not trained get zeros, and smaller ranks are padded with zeros. Where the
    strengths alpha / r differ, the difference is multiplied into B, in float32. All other values
    are the same to the bit.

    Args:
        found: the file; peft's ``adapter_config.json`` is read from the same folder.
        alpha: used if the file stores none. Without it the rank is used, as in diffusers.

    Returns:
        The matrices by their names in SAT, and the record.

    Raises:
        UserError: it is not a plain LoRA of CogVideoX's attention layers, or damaged, or the file
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
    """Layer, as the transformer of diffusers names it → its matrices under "A" and "B"."""
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
            f"holds {len(others)} tensors for which SAT's LoRA has no place ({first_of(others)}): "
            f"it has one lora_A and one lora_B for each {', '.join(_PARTS)} of a block of "
            "CogVideoX-2B",
        )
    return layers


def _not_plain(where: str | Path, what: str) -> UserError:
    """The error for an update that SAT's LoRA cannot hold."""
    return UserError(
        f"{where} {what}; if the LoRA is for CogVideoX-2B, merge it in diffusers "
        "(load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained) and name that folder "
        "in load"
    )


def _read_settings(path: Path, metadata: Mapping[str, str]) -> _AdapterSettings | None:
    """The settings in a file's own metadata, or in peft's file beside it; None if there are none.

    Raises:
        UserError: they are damaged, or not those of a plain LoRA.
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
        # In peft they are regular expressions, which in a stranger's file could take forever.
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise _not_plain(where, f"has the pattern {key!r}, which is not the name of a layer")
    return settings


def _by_pattern(patterns: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The value of the first key that is the layer's name or, without a leading ^, its end."""
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
    """Layer → its two matrices, compared with the settings; `alpha` is that of the file.

    Raises:
        UserError: a layer has one matrix only, or matrices of another rank.
    """
    pairs = {}
    for layer, both in layers.items():
        down, up = both.get("A"), both.get("B")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2:
            raise damaged(path, f"has no two matrices for {layer}")
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
                f"has matrices for {layer} of {list(down.shape)} and {list(up.shape)}, which is "
                f"not rank {expected}",
            )
        pairs[layer] = _Pair(down, up, own)
    return pairs


def _common_alpha(pairs: Iterable[_Pair], rank: int) -> float:
    """The alpha that at the largest rank is right for the most layers; 0 if all have 0."""
    counts = Counter((pair.alpha, pair.rank) for pair in pairs if pair.alpha)
    if not counts:
        return 0.0
    (alpha, own_rank), _ = counts.most_common(1)[0]
    return float(alpha if own_rank == rank else alpha * rank / own_rank)


def _padded(pair: _Pair, rank: int, alpha: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose update with `alpha` is the pair's own."""
    down, up = pair.down, pair.up
    if alpha and not math.isclose(pair.alpha * rank, alpha * pair.rank, rel_tol=1e-12):
        up = up.float() * (pair.alpha / pair.rank / (alpha / rank))
    missing = rank - pair.rank
    if missing:
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        up = torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1)
    return down, up
