"""Find out what a file or folder of weights is: kind, sizes, precision, and whether it loads.

Only tensor names and shapes are read, and the values of the small vectors that identify a model. No
code from a file is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sgm.checkpoint.diffusers_folder import PART_CLASSES, is_pipeline
from sgm.checkpoint.find import (
    MODEL_FILES,
    SAT_FILE,
    Weights,
    find_autoencoder,
    find_foreign_file,
    find_lora,
    find_t5,
    find_tokenizer,
    find_transformer,
)
from sgm.checkpoint.lora import check_matrices, check_whole_lora, is_sat_lora, read_lora
from sgm.checkpoint.lora_formats import LoraRecord, is_foreign
from sgm.checkpoint.strict_loading import differences
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.text_encoder import check_t5
from sgm.checkpoint.transformer import (
    MODEL_PREFIX,
    OTHER_PARTS,
    fingerprint,
    is_lora_matrix,
    read_transformer,
)
from sgm.checkpoint.vae import ENGINE_PREFIX, holds_autoencoder, load_vae_state
from sgm.checkpoint.weight_file import read_json
from sgm.errors import UserError, first_of
from sgm.files import expanded
from sgm.modules.encoders.modules import T5Tokenizer
from tools.launch.choose_config import FULL
from tools.weights.sizes import (
    SHIPPED,
    fitting_config,
    shipped_shapes,
    sizes_of,
    weights_of,
    without_positions,
)

_PIPELINE_PARTS = ("transformer", "vae", "text_encoder")
# Keys of training states that this project, DeepSpeed or PyTorch's optimizers save.
_TRAINING_KEYS = {"optimizer", "optimizer_state_dict", "param_groups", "zero_stage", "schedule"}
_TRANSFORMER_NAMES = (MODEL_PREFIX, "transformer.layers.", "mixins.", "transformer_blocks.")
_TEXT_PROJECTION = "mixins.patch_embed.text_proj.weight"
_T5_NAMES = ("encoder.block.", "encoder.embed_tokens.", "shared.")
# Sizes that CogVideoX-5B and CogVideoX1.5-5B have in common.
_FIVE_B = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64}


@dataclass
class Finding:
    """What is known about a file or folder.

    Args:
        path: the file or folder.
        kind: a noun phrase that says what the file or folder is.
        facts: (name, value) pairs, in the order in which they are shown.
        use: which configuration it loads with; empty if it does not load.
        problem: the reason why it does not load; empty if it loads.
    """

    path: Path
    kind: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    use: str = ""
    problem: str = ""


def inspect(path: str | Path) -> list[Finding]:
    """Return what is known about the file or folder `path`.

    If `path` is a folder with several parts, one finding for each part follows the folder's.

    Raises:
        UserError: `path` does not exist, is damaged, or does not contain weights; the message says
            what `path` is.
    """
    place = expanded(path)
    try:
        if place.is_dir():
            return _inspect_folder(place)
        if not place.exists():
            raise UserError(f"{path} does not exist; check the path")
        return [_inspect_file(Weights.of_file(place, place, "PATH"))]
    except OSError as error:  # such as a name that is too long, or a folder without permissions
        reason = f"cannot be read ({error.strerror}); check the path and its permissions"
        raise UserError(f"{str(path)[:200]} {reason}") from None


def _inspect_folder(folder: Path) -> list[Finding]:
    if is_pipeline(folder):  # raises UserError if the pipeline is of another model
        index = read_json(folder / "model_index.json")
        parts = [part for part in _PIPELINE_PARTS if index.get(part) != [None, None]]
        return _inspect_parts("diffusers pipeline", folder, parts)
    if find_foreign_file(folder):
        return [_describe_lora(find_lora(folder, option="PATH"))]
    if any((folder / name).is_file() for name in ("latest", *MODEL_FILES)):
        return [_inspect_file(find_transformer(folder, option="PATH"))]
    if (folder / "config.json").is_file():
        return [_inspect_part(folder)]
    if (folder / SAT_FILE).is_file():
        return [_describe_vae(find_autoencoder(folder, option="PATH"))]
    # The published layout: all parts in SAT's format, with or without T5.
    names = sorted(entry.name for entry in folder.iterdir())
    parts = [name for name in ("transformer", f"vae/{SAT_FILE}") if (folder / name).exists()]
    if not parts:
        raise _not_ours(folder, f"it contains {_few(names) or 'nothing'}")
    parts += [name for name in names if find_tokenizer(folder / name)]
    return _inspect_parts("whole model in SAT's layout", folder, parts)


def _inspect_part(folder: Path) -> Finding:
    """Inspect a folder that has a ``config.json`` of diffusers or transformers."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name", config.get("model_type"))
    if name == PART_CLASSES["transformer"]:
        return _describe_transformer(find_transformer(folder, option="PATH"))
    if name == PART_CLASSES["vae"]:
        return _describe_vae(find_autoencoder(folder, option="PATH"))
    if name == "t5":
        return _describe_t5(folder)
    raise _not_ours(folder, f"its config.json is for {name!r}")


def _inspect_parts(kind: str, folder: Path, names: Iterable[str]) -> list[Finding]:
    """Return findings for a folder and each of its parts, including parts that cannot be read."""
    found = [Finding(folder, kind)]
    for name in names:
        try:
            found += inspect(folder / name)
        except UserError as error:
            found.append(Finding(folder / name, "not usable", problem=str(error)))
    return found


def _inspect_file(weights: Weights) -> Finding:
    """Inspect a file; the names of its tensors show what it contains."""
    file, path = weights.file, weights.path
    state = file.read().state
    if isinstance(state, Mapping) and "module" not in state and _TRAINING_KEYS & state.keys():
        raise _not_ours(path, "it is a training state, which is only used with --resume")
    tensors = file.tensors()

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in tensors)

    own = [name for name in tensors if not name.startswith(OTHER_PARTS)]
    if is_foreign(own) or (own and all(map(is_lora_matrix, own))):
        return _describe_lora(weights)
    if has(*_TRANSFORMER_NAMES):
        return _describe_transformer(weights)
    if has(*_T5_NAMES):
        raise UserError(
            f"{path} contains weights of a T5 text encoder, which load only from a folder with "
            "config.json; name this folder"
        )
    if has(ENGINE_PREFIX, "encoder.", "decoder."):
        return _describe_vae(weights)
    raise _not_ours(path, f"its tensors have unknown names ({_few(list(tensors))})")


def _not_ours(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not weights of CogVideoX-2B: {reason}; name a .pt or .safetensors file, or a "
        "folder of such files"
    )


def _describe_transformer(weights: Weights) -> Finding:
    _, base, lora = read_transformer(weights)
    finding = _compared(weights, base, "transformer")
    identity = f"{fingerprint(base)} (hash of biases and norms, unchanged by merging a LoRA)"
    finding.facts.append(("family", identity))
    if lora:
        rank = min(next(iter(lora.values())).shape, default=0)
        also = f"{len(lora)} matrices of rank {rank}, which need a lora_config with this r"
        finding.facts.append(("LoRA", also))
    if holds_autoencoder(weights):
        finding.facts.append(("also contains", "an autoencoder"))
    return finding


def _describe_vae(weights: Weights) -> Finding:
    return _compared(weights, load_vae_state(weights, option=weights.option), "vae")


def _compared(
    weights: Weights, tensors: Mapping[str, Tensor], part: Literal["transformer", "vae"]
) -> Finding:
    """Compare a transformer or an autoencoder with a model of its sizes and the shipped models."""
    shapes = on_meta(tensors)
    sizes: dict[str, Any] = {}
    model = shipped_shapes(FULL, part)  # used if the sizes cannot be derived from the weights
    with suppress(UserError):
        sizes = sizes_of(shapes, part, weights.path)
        model = weights_of(sizes, part, where=weights.path)
    noun = "transformer" if part == "transformer" else "video autoencoder (VAE)"
    form = "diffusers" if weights.is_folder else "SAT"
    finding = Finding(weights.path, f"{noun} in {form} format")
    finding.facts = [*((key, str(value)) for key, value in sizes.items()), *_amounts(shapes)]
    # The position table is ignored because its size depends on the clips, not on the model.
    unfit = differences(without_positions(shapes), without_positions(model))
    for kind, names in unfit.items():
        if names or kind in ("missing", "unknown"):
            finding.facts.append((kind, _few(names) or "nothing"))
    if _FIVE_B.items() <= sizes.items():
        finding.problem = "it has the sizes of CogVideoX-5B, but only 2B is supported"
    elif any(unfit.values()):
        finding.problem = "its tensors differ from the model's, as listed above"
    else:
        finding.use = _use_with(fitting_config(shapes, part))
    return finding


def _use_with(config: str | None) -> str:
    return f"with {config or 'a configuration of these sizes; no file in configs/ has them'}"


def _amounts(shapes: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return facts about the number of parameters, the bytes and the precision."""
    parameters = sum(shape.numel() for shape in shapes.values())
    size = sum(shape.nbytes for shape in shapes.values())
    dtypes = Counter(str(shape.dtype).removeprefix("torch.") for shape in shapes.values())
    counted = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.most_common())
    return [
        ("parameters", f"{parameters / 1e6:,.2f} M, {size / 1e6:,.1f} MB"),
        ("dtype", counted if len(dtypes) > 1 else "".join(dtypes)),
    ]


def _describe_lora(weights: Weights) -> Finding:
    """Describe a LoRA of SAT, diffusers or peft."""
    matrices, record = read_lora(weights, option="PATH")
    check_whole_lora(matrices, record, weights.path)
    form = "SAT" if is_sat_lora(weights) else "diffusers or peft"
    layers = {name.rsplit(".matrix_", 1)[0] for name in matrices}
    width = next(matrix.shape[1] for name, matrix in matrices.items() if ".matrix_A." in name)
    alpha = "unknown, so 1 is used" if record.lora_alpha is None else f"{record.lora_alpha:g}"
    facts = [
        ("rank", str(record.r)),
        ("alpha", alpha),
        ("layers", str(len(layers))),
        ("width", str(width)),
        *_amounts(on_meta(matrices)),
        ("base model", record.base or "unknown"),
    ]
    config = _config_of(matrices, record)
    return Finding(weights.path, f"LoRA in {form} format", facts, _use_with(config))


def _config_of(matrices: Mapping[str, Tensor], record: LoraRecord) -> str | None:
    """Return the first configuration in `SHIPPED` that has the layers of a LoRA, or None."""
    for name in SHIPPED:
        with suppress(UserError):
            model = shipped_shapes(name, "transformer")
            check_matrices(matrices, record, model, path="the LoRA")
            return name
    return None


def _describe_t5(folder: Path) -> Finding:
    files = find_t5(folder, option="PATH")
    check_t5(files, dtype=torch.float32)
    T5Tokenizer(files.tokenizer, max_length=1)  # raises UserError if it is not T5's tokenizer
    shapes: dict[str, Tensor] = {}
    for file in files.files:
        shapes |= on_meta(file.tensors())
    sizes = {key: files.config.get(key) for key in ("num_layers", "d_model", "num_heads")}
    facts = [*((key, str(value)) for key, value in sizes.items()), *_amounts(shapes)]
    widths = {
        name: shipped_shapes(name, "transformer")[_TEXT_PROJECTION].shape[1] for name in SHIPPED
    }
    config = next((name for name in SHIPPED if widths[name] == sizes["d_model"]), None)
    return Finding(folder, "T5 text encoder", facts, _use_with(config))


def _few(names: Sequence[str]) -> str:
    """Return the first of `names` as text; if some are omitted, append the total number."""
    shown = first_of(names)
    return f"{shown} ({len(names)})" if shown.endswith("…") else shown
