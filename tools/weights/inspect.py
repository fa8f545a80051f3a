"""What a file or folder is, and what is to be said of it: from its names to its kind.

Names and shapes are read, and of the values only the small vectors that identify a model. No code
from a file is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sgm.checkpoint.diffusers_folder import PART_CLASSES, is_pipeline
from sgm.checkpoint.find import (
    MODEL_FILES,
    SAT_FILE,
    find_foreign_file,
    find_tokenizer,
    find_transformer,
)
from sgm.checkpoint.lora_formats import is_foreign
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.transformer import MODEL_PREFIX, OTHER_PARTS, is_lora_matrix
from sgm.checkpoint.vae import ENGINE_PREFIX
from sgm.checkpoint.weight_file import check_kind, read_json
from sgm.errors import UserError
from sgm.modules.encoders.modules import T5Tokenizer
from tools.weights.findings import (
    Finding,
    KnownModel,
    describe_lora,
    describe_t5,
    describe_transformer,
    describe_vae,
    few,
)

_KEYS = {  # of a configuration, by the part of a pipeline that they name
    "transformer": "args.load",
    "vae": "model.first_stage_config.params.ckpt_path",
    "text_encoder": "model.conditioner_config.params.emb_models[0].params.model_dir",
}
_PIPELINE_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

# Beginnings of names of other parts in a checkpoint of the whole engine.
_OTHER = {ENGINE_PREFIX: "autoencoder", "conditioner.": "text encoder"}
# What only the state of a training has: of this code, of DeepSpeed, of PyTorch's optimizers.
_TRAINING_KEYS = {"optimizer", "optimizer_state_dict", "param_groups", "zero_stage", "schedule"}
_SAT_VAE = ("encoder.down.", "encoder.mid.block", "decoder.up.", "decoder.mid.block")
_DIFFUSERS_VAE = ("encoder.down_blocks.", "decoder.up_blocks.")
_T5 = ("encoder.block.", "encoder.embed_tokens.", "shared.")


def inspect(path: str | Path, known: Sequence[KnownModel]) -> Finding:
    """Find out what `path` is.

    Args:
        path: any file or folder.
        known: the models to compare with, one at least.

    Raises:
        UserError: there is nothing, or something that is no weights; the sentence says what.
    """
    place = Path(os.path.expanduser(path))
    try:
        if place.is_dir():
            return _inspect_folder(place, known)
        if not place.exists():
            raise UserError(f"{path} does not exist; check the path")
        return _inspect_file(place, known, given=place)
    except OSError as error:  # a name that is too long, a folder of somebody else …
        raise UserError(
            f"{str(path)[:200]} cannot be read ({error.strerror}); check the path and its "
            "permissions"
        ) from None


def _inspect_folder(folder: Path, known: Sequence[KnownModel]) -> Finding:
    if (folder / "model_index.json").is_file():
        return _inspect_pipeline(folder, known)
    if find_foreign_file(folder):
        return describe_lora(folder, known, given=folder, is_sat=False)
    if any((folder / name).is_file() for name in ("latest", *MODEL_FILES)):
        return _inspect_run(folder, known)
    if (folder / "config.json").is_file():
        return _inspect_part(folder, known)
    if (folder / SAT_FILE).is_file():
        return _inspect_file(folder / SAT_FILE, known, given=folder)
    if tokenizer := find_tokenizer(folder):
        T5Tokenizer(tokenizer, max_length=1)  # refuses another one
        return Finding("tokenizer of T5", use="in a T5 folder or a diffusers pipeline")
    if (folder / "scheduler_config.json").is_file():
        name = read_json(folder / "scheduler_config.json").get("_class_name")
        return Finding("scheduler of diffusers", [("class", str(name))])
    return _inspect_published(folder, known)


def _inspect_part(folder: Path, known: Sequence[KnownModel]) -> Finding:
    """A folder with a ``config.json``: of diffusers or of transformers."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name == PART_CLASSES["transformer"]:
        return describe_transformer(folder, known, given=folder)
    if name == PART_CLASSES["vae"]:
        return describe_vae(folder, known, given=folder)
    if config.get("model_type") == "t5":
        return describe_t5(folder, known)
    raise UserError(
        f"{folder} belongs to another model ({name or config.get('model_type')!r}); CogVideoX-2B "
        f"consists of a {' and a '.join(PART_CLASSES.values())} and T5"
    )


def _inspect_run(folder: Path, known: Sequence[KnownModel]) -> Finding:
    """SAT's layout: the folder with ``latest``, of a run for one, or that of an iteration."""
    file = find_transformer(folder, option="PATH").path
    finding = _inspect_file(file, known, given=folder)
    finding.facts.insert(0, ("file", str(file)))
    if (folder / "latest").is_file():
        tags = [entry.name for entry in folder.iterdir() if (entry / file.name).is_file()]
        tags.sort(key=lambda tag: (len(tag), tag))
        finding.facts.insert(0, ("checkpoints", f"{few(tags)}; latest is {file.parent.name}"))
    if (file.parent / "training_state.pt").is_file():
        finding.next_steps.append(f"to go on training: --resume {quote(str(folder))}")
    return finding


def _inspect_pipeline(folder: Path, known: Sequence[KnownModel]) -> Finding:
    is_pipeline(folder)  # refuses another model's
    index = read_json(folder / "model_index.json")
    absent = [
        name
        for name in _PIPELINE_PARTS
        if index.get(name) == [None, None] and not (folder / name).exists()
    ]
    present = [name for name in _PIPELINE_PARTS if name not in absent]
    finding = _united("diffusers pipeline", _inspect_parts(folder, present, known))
    finding.facts += [(name, "not in this folder") for name in absent]
    if absent and finding.use:
        finding.use = f"{', '.join(present)}: {finding.use}"
    if not finding.problem:
        keys = ", ".join(key for name, key in _KEYS.items() if name in present)
        finding.next_steps = [
            f"{keys}: {quote(str(folder))}",
            f"python tools/convert_weight_hf2sat.py --input_path {quote(str(folder))} "
            "--output_path DIR",
        ]
    return finding


def _inspect_published(folder: Path, known: Sequence[KnownModel]) -> Finding:
    """The folder of the whole model in SAT's layout, with T5 in it or not."""
    names = sorted(entry.name for entry in folder.iterdir())
    places = [name for name in ("transformer", f"vae/{SAT_FILE}") if (folder / name).exists()]
    if not places:
        raise UserError(
            f"{folder} is no folder of weights (it holds {few(names) or 'nothing'}); name the "
            "file or folder that is"
        )
    places += [name for name in names if find_tokenizer(folder / name)]
    return _united("whole model in SAT's layout", _inspect_parts(folder, places, known))


def _inspect_parts(
    folder: Path, names: Iterable[str], known: Sequence[KnownModel]
) -> dict[str, Finding]:
    """A finding per part of a folder, also for those that cannot be read."""
    found = {}
    for name in names:
        try:
            found[name] = inspect(folder / name, known)
        except UserError as error:
            found[name] = Finding("not usable", problem=str(error))
    return found


def _united(kind: str, found: Mapping[str, Finding]) -> Finding:
    """One finding of several parts: a line for each."""
    uses = [part.use for part in found.values() if part.use.startswith("with ")]
    return Finding(
        kind,
        [(name, part.summary()) for name, part in found.items()],
        use="; ".join(dict.fromkeys(uses)),
        problem="; ".join(part.problem for part in found.values() if part.problem),
        next_steps=[step for part in found.values() for step in part.next_steps],
    )


def _inspect_file(file: Path, known: Sequence[KnownModel], *, given: Path) -> Finding:
    """A file of weights; `given` is what to name in commands."""
    refuse_other_files(file)
    state = read_checkpoint(file)
    keys = set(map(str, state)) if isinstance(state, dict) else set()
    if keys & _TRAINING_KEYS and "module" not in keys:
        return _training_state(file, state)
    tensors = tensors_of(state, file, wrapper="module")
    finding = _of_names(tensors, file, known, given=given)
    own = file.stat().st_size
    finding.facts.append(("on disk", f"{own / 1e9:.2f} GB" if own > 1e8 else f"{own / 1e6:.2f} MB"))
    return finding


def _of_names(
    tensors: Mapping[str, Any], file: Path, known: Sequence[KnownModel], *, given: Path
) -> Finding:
    """What tensors of these names are."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in tensors)

    if has(MODEL_PREFIX, "transformer.layers.", "mixins."):
        own = [name for name in tensors if not name.startswith(OTHER_PARTS)]
        if all(map(is_lora_matrix, own)):
            return describe_lora(file, known, given=given, is_sat=True)
        finding = describe_transformer(file, known, given=given)
        for prefix, name in _OTHER.items():
            count = sum(other.startswith(prefix) for other in tensors)
            if count:
                finding.facts.append(("beside it", f"{name}, {count} tensors"))
        return finding
    if is_foreign(tensors):
        return describe_lora(file, known, given=given, is_sat=False)
    if has(ENGINE_PREFIX, *_SAT_VAE):
        return describe_vae(file, known, given=given)
    if has("transformer_blocks.", *_DIFFUSERS_VAE):
        return _file_of_diffusers(file, known)
    if has(*_T5):
        return Finding(
            "weights of a T5 text encoder",
            problem="without its folder nothing is known of it; inspect the folder",
        )
    raise UserError(
        f"{file} holds tensors, but of nothing that belongs to CogVideoX-2B ({few(list(tensors))})"
    )


def _file_of_diffusers(file: Path, known: Sequence[KnownModel]) -> Finding:
    if (file.parent / "config.json").is_file():
        finding = _inspect_part(file.parent, known)
        finding.facts.insert(0, ("folder", f"{file.parent}, which is what to name"))
        return finding
    return Finding(
        "transformer or autoencoder with diffusers' names",
        problem="config.json must lie beside it, and the folder be named",
    )


def _training_state(file: Path, state: Mapping[str, Any]) -> Finding:
    """What a run, of this code or of DeepSpeed's, keeps for itself."""
    finding = Finding("state of a training (optimizer, schedule, random numbers), not weights")
    step = state.get("step")
    if isinstance(step, int):
        finding.facts.append(("step", str(step)))
    finding.use = "to go on training from its folder"
    finding.next_steps.append(f"--resume {quote(str(file.parent))}")
    return finding


# Position and bytes by which a kind of file is known, and its name in a sentence.
_MARKS = (
    (4, b"ftyp", "a video or picture (mp4, mov, heic …)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (mkv or webm)"),
    (8, b"AVI ", "a video (avi)"),
    (8, b"WEBP", "a picture (webp)"),
    (0, b"\x89PNG", "a picture (png)"),
    (0, b"\xff\xd8\xff", "a picture (jpeg)"),
    (0, b"GIF8", "a picture (gif)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"GGUF", "a GGUF file of llama.cpp and ComfyUI"),
    (0, b"\x89HDF", "an HDF5 file, as TensorFlow's weights are"),
    (0, b"\x93NUMPY", "an array of NumPy"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a rar archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x7fELF", "a program"),
)
_HEAD_BYTES = 4096


def refuse_other_files(path: Path) -> None:
    """Refuse a file that its first bytes show to be something else than weights.

    Raises:
        UserError: it is, or it cannot be read; the sentence says what it is.
    """
    check_kind(path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for position, mark, name in _MARKS:
        if head[position : position + len(mark)] == mark:
            raise UserError(f"{path} is {name}, not weights; name a .pt or .safetensors file")
    if _is_text(head):
        raise UserError(
            f"{path} is a text file, not weights; name a .pt or .safetensors file, or the folder "
            "that they are in"
        )


def _is_text(head: bytes) -> bool:
    """Whether there are but printable characters; a safetensors header has its length before."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just a character that is cut off
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)
