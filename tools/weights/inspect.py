"""What a file or folder of weights is: its kind, sizes and precision, and whether it loads.

Names and shapes are read, and of the values only the small vectors that identify a model. No code
from a file is run.
"""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
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
from sgm.checkpoint.lora import check_whole_lora, read_lora
from sgm.checkpoint.lora_formats import is_foreign
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.text_encoder import check_t5
from sgm.checkpoint.transformer import (
    MODEL_PREFIX,
    OTHER_PARTS,
    fingerprint,
    is_lora_matrix,
    read_transformer,
)
from sgm.checkpoint.vae import ENGINE_PREFIX, load_vae_state
from sgm.checkpoint.weight_file import open_file, read_json
from sgm.errors import UserError, first_of
from sgm.modules.encoders.modules import T5Tokenizer
from tools.weights.sizes import SHIPPED, Comparison, compare, shipped_config, shipped_shapes
from tools.weights.sources import ROOT

_KEYS = {  # part of a pipeline → the key of a configuration that names it
    "transformer": "args.load",
    "vae": "model.first_stage_config.params.ckpt_path",
    "text_encoder": "model.conditioner_config.params.emb_models[0].params.model_dir",
}
_PIPELINE_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
# Beginning of names → other part in a checkpoint of the whole engine.
_PART_NAMES = {ENGINE_PREFIX: "autoencoder", "conditioner.": "text encoder"}
# Keys of training states: of this code, of DeepSpeed and of PyTorch's optimizers.
_TRAINING_KEYS = {"optimizer", "optimizer_state_dict", "param_groups", "zero_stage", "schedule"}
_SAT_VAE = ("encoder.down.", "encoder.mid.block", "decoder.up.", "decoder.mid.block")
_DIFFUSERS = ("transformer_blocks.", "encoder.down_blocks.", "decoder.up_blocks.")
_T5 = ("encoder.block.", "encoder.embed_tokens.", "shared.")
_NOT_IN_SUMMARY = ("checkpoints", "file", "family", "channels", "text")
# Sizes that CogVideoX-5B and CogVideoX1.5-5B share.
_FIVE_B = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64}
_MARKS = (  # position and bytes by which another kind of file is recognised, and its name
    (4, b"ftyp", "a video or picture (mp4, mov, heic …)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (mkv or webm)"),
    (0, b"\x89PNG", "a picture (png)"),
    (0, b"\xff\xd8\xff", "a picture (jpeg)"),
    (0, b"GGUF", "a GGUF file of llama.cpp and ComfyUI"),
    (0, b"\x89HDF", "an HDF5 file of TensorFlow"),
    (0, b"\x1f\x8b", "a gzip archive"),
)
_HEAD_BYTES = 4096


@dataclass
class Finding:
    """What is known about a file or folder.

    Args:
        kind: what it is, as a noun.
        facts: (name, value) in the order in which they are shown.
        use: how it loads, or what it is a part of; empty if it does not load.
        problem: why it does not load; empty if it does.
        next_steps: lines of a configuration and commands that use it.
    """

    kind: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    use: str = ""
    problem: str = ""
    next_steps: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Kind and facts in one line."""
        facts = (f"{name} {value}" for name, value in self.facts if name not in _NOT_IN_SUMMARY)
        return ", ".join([self.kind, *facts])


def inspect(path: str | Path) -> Finding:
    """Find out what the file or folder `path` is.

    Raises:
        UserError: it does not exist, or is not weights; the message says what it is.
    """
    place = Path(os.path.expanduser(path))
    try:
        if place.is_dir():
            return _inspect_folder(place)
        if not place.exists():
            raise UserError(f"{path} does not exist; check the path")
        return _inspect_file(Weights.of_file(place, place, "PATH"))
    except OSError as error:  # the name is too long, the folder is another user's …
        reason = f"cannot be read ({error.strerror}); check the path and its permissions"
        raise UserError(f"{str(path)[:200]} {reason}") from None


def _inspect_folder(folder: Path) -> Finding:
    if is_pipeline(folder):  # or raises UserError if it is another model's
        return _inspect_pipeline(folder)
    if find_foreign_file(folder):
        return _describe_lora(find_lora(folder), "diffusers or peft")
    if any((folder / name).is_file() for name in ("latest", *MODEL_FILES)):
        return _inspect_run(folder)
    if (folder / "config.json").is_file():
        return _inspect_part(folder)
    if (folder / SAT_FILE).is_file():
        return _inspect_file(find_autoencoder(folder, option="PATH"))
    if tokenizer := find_tokenizer(folder):
        T5Tokenizer(tokenizer, max_length=1)  # raises UserError if it is another tokenizer
        return Finding("tokenizer of T5", use="in a T5 folder or a diffusers pipeline")
    if (folder / "scheduler_config.json").is_file():
        name = read_json(folder / "scheduler_config.json").get("_class_name")
        return Finding("scheduler of diffusers", [("class", str(name))])
    # The published layout: all parts in SAT's format, with T5 or without.
    names = sorted(entry.name for entry in folder.iterdir())
    places = [name for name in ("transformer", f"vae/{SAT_FILE}") if (folder / name).exists()]
    if not places:
        raise _not_ours(folder, f"it holds {_few(names) or 'nothing'}")
    places += [name for name in names if find_tokenizer(folder / name)]
    return _inspect_parts("whole model in SAT's layout", folder, places)


def _inspect_part(folder: Path) -> Finding:
    """A folder with a ``config.json``, of diffusers or of transformers."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name", config.get("model_type"))
    if name == PART_CLASSES["transformer"]:
        return _describe_transformer(find_transformer(folder, option="PATH"))
    if name == PART_CLASSES["vae"]:
        return _describe_vae(find_autoencoder(folder, option="PATH"))
    if name == "t5":
        return _describe_t5(folder)
    raise _not_ours(folder, f"its config.json is that of {name!r}")


def _inspect_run(folder: Path) -> Finding:
    """A folder with ``latest``, such as that of a run, or the folder of one iteration."""
    weights = find_transformer(folder, option="PATH")
    file = weights.path
    finding = _inspect_file(weights)
    finding.facts.insert(0, ("file", str(file)))
    if (folder / "latest").is_file():
        tags = [entry.name for entry in folder.iterdir() if (entry / file.name).is_file()]
        tags.sort(key=lambda tag: (len(tag), tag))
        finding.facts.insert(0, ("checkpoints", f"{_few(tags)}; latest is {file.parent.name}"))
    if (file.parent / "training_state.pt").is_file():
        finding.next_steps.append(f"to resume training: --resume {quote(str(folder))}")
    return finding


def _inspect_pipeline(folder: Path) -> Finding:
    index = read_json(folder / "model_index.json")
    present = [
        part
        for part in _PIPELINE_PARTS
        if index.get(part) != [None, None] or (folder / part).exists()
    ]
    left_out = [part for part in _PIPELINE_PARTS if part not in present]
    finding = _inspect_parts("diffusers pipeline", folder, present)
    finding.facts += [(name, "not in this folder") for name in left_out]
    if left_out and finding.use:
        finding.use = f"{', '.join(present)}: {finding.use}"
    if not finding.problem:
        path = quote(str(folder))
        finding.next_steps = [
            f"{', '.join(key for name, key in _KEYS.items() if name in present)}: {path}",
            f"python tools/convert_weight_hf2sat.py --input_path {path} --output_path DIR",
        ]
    return finding


def _inspect_parts(kind: str, folder: Path, names: Iterable[str]) -> Finding:
    """One finding with a line for each part of a folder, readable or not."""
    found = {}
    for name in names:
        try:
            found[name] = inspect(folder / name)
        except UserError as error:
            found[name] = Finding("not usable", problem=str(error))
    uses = [part.use for part in found.values() if part.use.startswith("with ")]
    return Finding(
        kind,
        [(name, part.summary()) for name, part in found.items()],
        use="; ".join(dict.fromkeys(uses)),
        problem="; ".join(part.problem for part in found.values() if part.problem),
        next_steps=[step for part in found.values() for step in part.next_steps],
    )


def _inspect_file(weights: Weights) -> Finding:
    """A file; its names say what it holds."""
    file, path = weights.file, weights.path
    _check_file_kind(path)
    state = file.read().state
    keys = set(map(str, state)) if isinstance(state, Mapping) else set()
    if keys & _TRAINING_KEYS and "module" not in keys:
        step = state.get("step")
        return Finding(
            "state of a training (optimizer, schedule, random numbers), not weights",
            [("step", str(step))] if isinstance(step, int) else [],
            use="to resume training from its folder",
            next_steps=[f"--resume {quote(str(path.parent))}"],
        )
    tensors = file.tensors()

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in tensors)

    if has(MODEL_PREFIX, "transformer.layers.", "mixins."):
        if all(is_lora_matrix(name) for name in tensors if not name.startswith(OTHER_PARTS)):
            return _describe_lora(weights, "SAT")
        finding = _describe_transformer(weights)
        for prefix, part in _PART_NAMES.items():
            if count := sum(name.startswith(prefix) for name in tensors):
                finding.facts.append(("beside it", f"{part}, {count} tensors"))
        return finding
    if is_foreign(tensors):
        return _describe_lora(weights, "diffusers or peft")
    if has(ENGINE_PREFIX, *_SAT_VAE):
        return _describe_vae(weights)
    if has(*_DIFFUSERS) and (path.parent / "config.json").is_file():
        finding = _inspect_part(path.parent)
        finding.facts.insert(0, ("folder", f"{path.parent}; name this folder, not the file"))
        return finding
    if has(*_DIFFUSERS, *_T5):
        kind = "T5 text encoder" if has(*_T5) else "transformer or autoencoder of diffusers"
        problem = "it loads only in a folder with its config.json; name that folder"
        return Finding(f"weights of a {kind}", problem=problem)
    raise _not_ours(path, f"its tensors have other names ({_few(list(tensors))})")


def _check_file_kind(path: Path) -> None:
    """Raise UserError if the first bytes of a file show that it is something else than weights."""
    with open_file(path) as file:
        head = file.read(_HEAD_BYTES)
    kinds = [name for start, mark, name in _MARKS if head.startswith(mark, start)]
    with suppress(UnicodeDecodeError):  # a character that is cut off at the end is not an error
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if all(character.isprintable() or character in "\t\r\n\f" for character in text):
            kinds.append("a text file")
    if kinds:
        raise _not_ours(path, f"it is {kinds[0]}")


def _not_ours(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not weights of CogVideoX-2B: {reason}; name a .pt or .safetensors file, or a "
        "folder of such files"
    )


def _compared(
    weights: Weights, tensors: Mapping[str, Tensor], part: Literal["transformer", "vae"]
) -> tuple[Finding, Comparison]:
    """What is known about a transformer or an autoencoder from its names and shapes."""
    shapes = on_meta(tensors)
    found = compare(shapes, part)
    noun = "transformer" if part == "transformer" else "video autoencoder (VAE)"
    finding = Finding(f"{noun} in {'diffusers' if weights.is_folder else 'SAT'} format")
    finding.facts = [*_size_facts(found.sizes), *_amounts(shapes)]
    for kind, names in found.differences.items():
        if names or kind in ("missing", "unknown"):
            finding.facts.append((kind, _few(names) or "nothing"))
    if found.fits:
        finding.use = f"with {found.config}"
    elif _FIVE_B.items() <= found.sizes.items():
        finding.problem = "it has the sizes of CogVideoX-5B, and only 2B is supported"
    elif found.is_whole:
        finding.use = "with a configuration of these sizes; no file of configs/ has them, "
        finding.use += f"the nearest is {found.config}"
    else:
        finding.problem = f"it differs from the nearest model, {found.config}, as listed above"
    return finding, found


def _describe_transformer(weights: Weights) -> Finding:
    _, base, lora = read_transformer(weights)
    finding, comparison = _compared(weights, base, "transformer")
    identity = f"{fingerprint(base)} (of biases and norms, which a merged LoRA does not change)"
    finding.facts.append(("family", identity))
    if lora:
        rank = min(next(iter(lora.values())).shape, default=0)
        finding.facts.append(("LoRA", f"{len(lora)} matrices of rank {rank} beside the weights"))
        if finding.use:
            finding.use += f" and a lora_config with r: {rank} under model"
    config, path = comparison.config, quote(str(weights))
    if comparison.fits:
        finding.next_steps.append(f"bash inference.sh {config} --load {path}")
    if comparison.is_whole and not weights.is_folder:
        command = f"convert_weight_sat2hf.py --transformer_ckpt_path {path} --output_path DIR"
        finding.next_steps.append(f"python tools/{command} --base {config}")
    return finding


def _describe_vae(weights: Weights) -> Finding:
    tensors = load_vae_state(weights, option=weights.option)
    finding, comparison = _compared(weights, tensors, "vae")
    if comparison.fits:
        path = quote(str(weights))
        finding.next_steps.append(f"{_KEYS['vae']}: {path} in {comparison.config}")
    return finding


def _size_facts(sizes: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "latent_channels" in sizes:
        widths = sizes["block_out_channels"]
        return [
            ("levels", f"{len(widths)} of width {', '.join(map(str, widths))}"),
            ("latents", f"{sizes['latent_channels']} channels"),
        ]
    if not sizes:
        return []
    heads, head = sizes["num_attention_heads"], sizes["attention_head_dim"]
    return [
        ("layers", str(sizes["num_layers"])),
        ("width", f"{heads * head}, {heads} heads of {head}"),
        ("channels", f"{sizes['in_channels']} in, {sizes['out_channels']} out"),
        ("text", f"embeddings of width {sizes['text_embed_dim']}"),
    ]


def _amounts(shapes: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Parameters, bytes and precision."""
    parameters = sum(shape.numel() for shape in shapes.values())
    size = sum(shape.nbytes for shape in shapes.values())
    dtypes = Counter(str(shape.dtype).removeprefix("torch.") for shape in shapes.values())
    counted = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.most_common())
    return [
        ("parameters", f"{parameters / 1e6:,.2f} M, {size / 1e6:,.1f} MB"),
        ("dtype", counted if len(dtypes) > 1 else "".join(dtypes)),
    ]


def _describe_lora(weights: Weights, form: str) -> Finding:
    """A LoRA of SAT, or of diffusers or peft."""
    try:
        matrices, record = read_lora(weights)
    except UserError as error:
        if form == "SAT":
            raise
        return _describe_other_lora(weights, str(error))
    width = next((m.shape[-1] for name, m in matrices.items() if ".matrix_A." in name), 0)
    found = (re.search(r"\.layers\.([0-9]{1,4})\.", name) for name in matrices)
    blocks = sorted({int(match[1]) for match in found if match})
    alpha, path = record.lora_alpha, quote(str(weights))
    strength = "unknown, so 1 is used"
    if alpha is not None:
        strength = f"{alpha:g}, so the update is {alpha / record.r:g} · B A"
    facts = [
        ("rank", str(record.r)),
        ("alpha", strength),
        ("layers", f"{len(blocks)}, {blocks[0]} to {blocks[-1]}" if blocks else "none"),
        ("width", str(width)),
        *_amounts(on_meta(matrices)),
        ("base model", _base_model(record.base)),
    ]
    finding = Finding(f"LoRA in {form} format", facts)
    try:
        check_whole_lora(matrices, record, weights)
    except UserError as error:
        finding.problem = str(error)
        return finding
    layer = f"transformer.layers.{max(blocks, default=0)}.input_layernorm.weight"
    config = _shipped_with(layer, width)
    if config is None:
        finding.use = f"on a CogVideoX-2B of width {width}; no file of configs/ describes one"
        return finding
    finding.use = f"on the model of {config}"
    convert = f"import_lora.py --lora_path {path} --output_path DIR"
    if form == "SAT":
        convert = f"export_sat_lora_weight.py --sat_pt_path {path} --lora_save_directory DIR"
    finding.next_steps = [f"bash inference.sh {config} --lora {path}", f"python tools/{convert}"]
    return finding


def _describe_other_lora(weights: Weights, problem: str) -> Finding:
    """A LoRA of diffusers or peft that does not load, as far as its names and shapes say."""
    shapes = on_meta(weights.file.tensors())
    downs = {n: t for n, t in shapes.items() if ".lora_A." in n and t.ndim == 2}
    ranks = sorted({tensor.shape[0] for tensor in downs.values()})
    ends = sorted({re.sub(r"^.*?[0-9]+\.|\.lora_A\..*$", "", name) for name in downs})
    is_dora = any("lora_magnitude_vector" in name or "dora_scale" in name for name in shapes)
    facts = [
        ("rank", ", ".join(map(str, ranks)) or "unknown"),
        ("layers", f"{len(downs)}: {_few(ends)}" if downs else "unknown"),
        *_amounts(shapes),
    ]
    kind = f"{'DoRA' if is_dora else 'LoRA'} in diffusers or peft format"
    return Finding(kind, facts, problem=problem)


def _shipped_with(weight: str, width: int) -> str | None:
    """The first shipped configuration whose transformer has a weight with this last size."""
    for name in SHIPPED:
        shapes = shipped_shapes(name, "transformer")
        if weight in shapes and shapes[weight].shape[-1] == width:
            return name
    return None


def _base_model(base: str | None) -> str:
    """The fingerprint of the model that a LoRA was trained on, and the path of that model."""
    for name in SHIPPED if base else ():
        load = ROOT / str(shipped_config(name).args.load)
        with suppress(UserError):  # it does not exist, or is damaged
            if fingerprint(read_transformer(load).base) == base:
                return f"{base} (that in {load})"
    return base or "unknown"


def _describe_t5(folder: Path) -> Finding:
    files = find_t5(folder, option="PATH")
    shapes: dict[str, Tensor] = {}
    for file in files.files:
        shapes |= on_meta(file.tensors())
    width, layers, heads = map(files.config.get, ("d_model", "num_layers", "num_heads"))
    facts = [("layers", str(layers)), ("width", f"{width}, {heads} heads"), *_amounts(shapes)]
    try:
        check_t5(files, dtype=torch.float32)
    except UserError as error:
        return Finding("T5 text encoder", facts, problem=str(error))
    config = _shipped_with("mixins.patch_embed.text_proj.weight", width)
    if config is None:
        use = f"with a transformer for text of width {width}; no file of configs/ has one"
        return Finding("T5 text encoder", facts, use)
    steps = [f"model_dir: {quote(str(folder))} in {config}"]
    return Finding("T5 text encoder", facts, f"with {config}", next_steps=steps)


def _few(names: Sequence[str]) -> str:
    """The first of `names`, and their number if these are not all."""
    shown = first_of(names)
    return f"{shown} ({len(names)})" if shown.endswith("…") else shown
