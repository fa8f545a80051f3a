"""LoRAs of diffusers and peft: their files, their settings, and what they are in SAT's terms.

diffusers writes ``pytorch_lora_weights.safetensors`` with the settings as JSON in its metadata,
peft a folder with ``adapter_model.safetensors`` and ``adapter_config.json``. Both name a layer's
update ``alpha / r · B A``, or with `use_rslora` ``alpha / √r · B A`` (Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA").
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgm.checkpoint.table import to_sat
from sgm.errors import UserError, first_of

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

METADATA_KEY = "lora_adapter_metadata"  # of the safetensors header, where diffusers puts settings
BASE_KEY = "sat_base_fingerprint"  # beside it, of LoRAs that were trained here
DIFFUSERS_PREFIX = "transformer."
LARGEST_ALPHA = 1e9  # no sensible one comes near
# The layers that SAT wraps, and into how many parts it cuts their outputs: q, k and v have a pair
# of matrices each.
NUM_PAIRS = {"query_key_value": 3, "dense": 1}
_CONFIG_FILE = "adapter_config.json"
_PREFIXES = (DIFFUSERS_PREFIX, "base_model.model.transformer.", "base_model.model.")
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>[AB])(?:\.default)?\.weight")
# Settings that make an update something else than alpha / r · B A, or add to it.
_OTHER_UPDATES = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
)
# Ways to begin that change the base model's weights too, so that the matrices alone do not tell.
_OTHER_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")
_MERGE_FIRST = (
    "merge it in diffusers (load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained) "
    "and name that folder in load"
)
_NUM_NAMED = 4  # layers that a message repeats


@dataclass(frozen=True)
class _Settings:
    """What diffusers or peft stored beside the matrices; None and nothing where they did not.

    Args:
        r, lora_alpha: of the layers without a pattern.
        rank_pattern, alpha_pattern: layer's name, or its end → its own.
        use_rslora: alpha is divided by the root of the rank.
    """

    r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False


@dataclass(frozen=True)
class _Pair:
    """The two matrices of a layer, and the alpha with which its update is alpha / r · B A."""

    down: Tensor  # A (r, in)
    up: Tensor  # B (out, r)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


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


def lora_layers(layer_range: Iterable[int]) -> list[str]:
    """Names of the layers that a LoRA of these blocks changes."""
    blocks = [f"transformer.layers.{number}.attention" for number in layer_range]
    return [f"{block}.{part}" for block in blocks for part in NUM_PAIRS]


def expected_matrices(
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


def lora_shapes(network: DiffusionTransformer) -> dict[str, Tensor]:
    """Name → meta tensor of the LoRA matrices of a network, which may still lack their layers."""
    mixin = network.mixins["lora"]
    weights = {n.replace(".original.", "."): weight for n, weight in network.named_parameters()}
    return expected_matrices(lora_layers(mixin.layer_range), weights, int(mixin.r))


def names_with_lora(network: DiffusionTransformer) -> list[str]:
    """Names that the weights of a network have once its LoRA layers, if any, are added."""
    names = [name for name, _ in network.named_parameters()]
    if not network.lora_config:
        return names
    wrapped = tuple(f"{layer}." for layer in lora_layers(network.mixins["lora"].layer_range))
    beside = [_original(name) if name.startswith(wrapped) else name for name in names]
    return [*beside, *lora_shapes(network)]


def _original(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{layer}.original.{kind}"


def is_foreign(names: Iterable[str]) -> bool:
    """Whether weights of these names are a LoRA of diffusers, peft or another code than SAT."""
    return any("lora_" in name or ".lora." in name for name in names)


def other_alpha(path: Path, stored: float, given: float) -> UserError:
    """The error where a user gives a lora_alpha and the file tells another."""
    return UserError(
        f"{path} was trained with lora_alpha={stored:g}, not {given:g}; leave the option out, a "
        "strength is given when the LoRA is merged"
    )


def to_sat_lora(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    metadata: Mapping[str, str],
    alpha: float | None,
) -> tuple[dict[str, Tensor], LoraRecord, bool]:
    """A LoRA of diffusers or peft as SAT holds it: all of q, k, v and dense, of one rank.

    Layers that were not trained get zeros, smaller ranks are filled up with zeros, and where the
    strengths alpha / r differ, the difference goes into B (then float32). All else is bit for bit.

    Args:
        tensors: what the file `path` holds.
        path: beside it peft's ``adapter_config.json`` is looked for.
        metadata: of its header, empty where it has none.
        alpha: taken where none is stored; without it the rank is taken, as diffusers does.

    Returns:
        The matrices by their names in SAT, the record, and whether the file tells its alpha.

    Raises:
        UserError: it is not a plain LoRA of CogVideoX's attention layers, or damaged.
    """
    matrices = _named_matrices(tensors, path)
    settings = _read_settings(path, metadata)
    stored = settings.lora_alpha
    if alpha is not None and stored is not None and alpha != stored:
        raise other_alpha(path, stored, alpha)
    pairs = _paired(matrices, settings, path, alpha=stored if alpha is None else alpha)
    rank = max(pair.rank for pair in pairs.values())
    common = _common_alpha(pairs.values(), rank)
    in_diffusers = {}
    for layer, pair in pairs.items():
        down, up = _padded(pair, rank, common)
        in_diffusers |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    found = dict(to_sat(in_diffusers, "lora", where=path))
    blocks = sorted({int(name.split(".")[2]) for name in found})
    record = LoraRecord(rank, common, blocks, base=_read_base(metadata))
    return _completed(found, blocks), record, stored is not None


def _named_matrices(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Layer, as the transformer of diffusers names it → its matrices under "A" and "B"."""
    layers: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for name, tensor in tensors.items():
        _refuse_kinds(name, path)
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        match = _MATRIX.fullmatch(name.removeprefix(prefix))
        if match is None:
            foreign.append(name)
            continue
        own = layers.setdefault(match["layer"], {})
        if match["kind"] in own:
            raise UserError(
                f"{path} holds the matrix {name} twice, with different prefixes; load and save it "
                "with diffusers first"
            )
        own[match["kind"]] = tensor
    if foreign:
        raise UserError(
            f"{path}: {foreign[0]!r} is not a matrix of a LoRA as diffusers and peft name them "
            f"(… .lora_A.weight, … .lora_B.weight); load and save it with diffusers first"
        )
    homeless = [layer for layer in layers if not _has_place(layer, path)]
    if homeless and not any(layer.startswith("transformer_blocks.") for layer in layers):
        raise UserError(
            f"{path} is a LoRA of another model than CogVideoX: it changes {homeless[0]}; choose "
            "one that was trained on CogVideoX-2B"
        )
    if homeless:
        kinds = sorted({re.sub(r"^transformer_blocks\.[0-9]+\.", "", layer) for layer in homeless})
        raise UserError(
            f"{path} also changes layers for which SAT's LoRA has no place "
            f"({first_of(kinds, _NUM_NAMED)}), as it holds to_q, to_k, to_v and to_out.0 only; "
            f"{_MERGE_FIRST}"
        )
    return layers


def _refuse_kinds(name: str, path: Path) -> None:
    """Refuse tensors that are known not to be matrices of the transformer's update."""
    if name.startswith("text_encoder"):
        raise UserError(
            f"{path} changes the text encoder too ({name}), which no LoRA does here; save it "
            "without these matrices"
        )
    if "lora_magnitude_vector" in name or "dora_scale" in name:
        raise UserError(f"{path} is a DoRA ({name}), which is no plain LoRA; {_MERGE_FIRST}")
    if name.endswith(".bias"):
        raise UserError(
            f"{path} changes biases too ({name}), which SAT's LoRA cannot; {_MERGE_FIRST}"
        )


def _has_place(layer: str, path: Path) -> bool:
    try:
        to_sat({f"{layer}.lora_A.weight": torch.empty(0)}, "lora", where=path)
    except UserError:
        return False
    return True


def _read_base(metadata: Mapping[str, str]) -> str | None:
    base = metadata.get(BASE_KEY, "")
    return base if re.fullmatch(r"\w{1,64}", base) else None


def _read_settings(path: Path, metadata: Mapping[str, str]) -> _Settings:
    """The settings in a file's own metadata, or in peft's file beside it; empty if neither is."""
    stored = metadata.get(METADATA_KEY)
    where, text = f"the metadata of {path}", stored
    config = path.with_name(_CONFIG_FILE)
    if not stored and config.is_file():
        where = str(config)
        try:
            text = config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{config} cannot be read ({error}); copy it again") from None
    if not text:
        return _Settings()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); copy the LoRA again") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} holds no settings of a LoRA; copy the LoRA again")
    own = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in values.items()}
    return _checked_settings(own, where)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_alpha(value: Any) -> bool:
    """Whether `value` is a number that a lora_alpha may be."""
    return type(value) in (int, float) and abs(value) <= LARGEST_ALPHA  # false for nan


def _checked_settings(values: Mapping[str, Any], where: str) -> _Settings:
    others = [name for name in _OTHER_UPDATES if values.get(name)]
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_STARTS):
        others.append(f"init_lora_weights={start}")
    if values.get("peft_type", "LORA") != "LORA":
        others.append(f"peft_type={values['peft_type']}")
    if others:
        raise UserError(f"{where} says {', '.join(others)}: it is no plain LoRA; {_MERGE_FIRST}")
    ranks, alphas = (values.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    sound = {
        "r": _is_rank(values.get("r")),
        "lora_alpha": is_alpha(values.get("lora_alpha")),
        "rank_pattern": isinstance(ranks, dict) and all(map(_is_rank, ranks.values())),
        "alpha_pattern": isinstance(alphas, dict) and all(map(is_alpha, alphas.values())),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise UserError(
                f"{where} has {name}={values.get(name)!r}; it is damaged, copy the LoRA again"
            )
    for key in (*ranks, *alphas):
        # In peft they are regular expressions, which from a stranger could take forever.
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise UserError(
                f"{where}: the pattern {key!r} is not the name of a layer; {_MERGE_FIRST}"
            )
    return _Settings(
        r=values["r"],
        lora_alpha=float(values["lora_alpha"]),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=bool(values.get("use_rslora")),
    )


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """What the first key gives that is the layer's name or, without a leading ^, its end."""
    for key, value in patterns.items():
        name = key.removeprefix("^")
        if layer == name or (name == key and layer.endswith(f".{name}")):
            return value
    return default


def _paired(
    matrices: Mapping[str, Mapping[str, Tensor]],
    settings: _Settings,
    path: Path,
    *,
    alpha: float | None,
) -> dict[str, _Pair]:
    pairs = {}
    for layer, both in matrices.items():
        down, up = both.get("A"), both.get("B")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2:
            raise UserError(f"{path} has no two matrices for {layer}; copy the LoRA again")
        rank = down.shape[0]
        expected = _by_pattern(settings.rank_pattern, layer, settings.r or rank)
        if not rank or up.shape[1] != rank or rank != expected:
            raise UserError(
                f"{path}: the matrices of {layer} are {list(down.shape)} and {list(up.shape)}, "
                f"which is not rank {expected}; the file is damaged, copy it again"
            )
        own = _by_pattern(settings.alpha_pattern, layer, rank if alpha is None else alpha)
        pairs[layer] = _Pair(down, up, own * math.sqrt(rank) if settings.use_rslora else own)
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


def _completed(found: Mapping[str, Tensor], blocks: Iterable[int]) -> dict[str, Tensor]:
    """`found` with zeros for the layers of these blocks that it lacks."""
    sources = {kind: next(t for n, t in found.items() if f".matrix_{kind}." in n) for kind in "AB"}
    matrices = {}
    for block in blocks:
        for part, num_pairs in NUM_PAIRS.items():
            for kind, source in sources.items():
                for i in range(num_pairs):
                    name = f"transformer.layers.{block}.attention.{part}.matrix_{kind}.{i}"
                    matrices[name] = found[name] if name in found else torch.zeros_like(source)
    return matrices
