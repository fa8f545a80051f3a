"""Finds the weights of the transformer, a LoRA, the autoencoder and T5 by their paths.

Only file names and JSON files are read, without PyTorch. Each ``find_…`` function takes a path and
returns one object, which the functions that check and load weights accept. Given such an object
instead of a path, a ``find_…`` function returns the object unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sgm.checkpoint.diffusers_folder import (
    DiffusersPart,
    find_diffusers_part,
    find_in_pipeline,
    find_shards,
)
from sgm.checkpoint.weight_file import (
    LONGEST_QUOTE,
    WeightFile,
    Weights,
    check_kind,
    damaged,
    incomplete,
    read_json,
)
from sgm.errors import UserError, first_of
from sgm.files import expanded

MODEL_FILES = ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.safetensors")
SAT_FILE = "3d-vae.pt"  # the autoencoder, as published
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_LORA_FILES = (
    DIFFUSERS_FILE,
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_LARGEST_POINTER = 1024  # bytes; the limit in the specification of git-lfs
Kind = Literal["load", "lora", "autoencoder", "t5"]
# The file names to look for in a folder, in order of preference; _PARTS: the diffusers part.
_FILES: Mapping[Kind, Sequence[str]] = {
    "load": MODEL_FILES,
    "lora": (*_LORA_FILES, *MODEL_FILES),
    "autoencoder": (SAT_FILE,),
}
_PARTS: Mapping[Kind, DiffusersPart] = {"load": "transformer", "autoencoder": "vae"}
_EXPECTED: Mapping[Kind, str] = {
    "load": "the transformer's folder (which contains the file 'latest'), its .pt file or a "
    "diffusers folder; the README says where to get the weights",
    "lora": "a LoRA: a training run's folder (which contains the file 'latest'), the folder of one "
    "of its checkpoints, a file, or a LoRA from diffusers or peft "
    "(pytorch_lora_weights.safetensors, adapter_model.safetensors or the folder of such a file)",
    "autoencoder": "the autoencoder's weights: 3d-vae.pt itself, or a diffusers folder; the README "
    "says where to get the weights",
    "t5": "the T5 folder, which contains config.json and T5's weights (for the 2B model a clone of "
    "https://huggingface.co/google/t5-v1_1-xxl), or the folder of a diffusers pipeline",
}
_NOUNS = {"load": "transformer", "lora": "LoRA", "autoencoder": "video autoencoder"}
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
VARIANT = ".fp16"  # in names of half-precision files; files without it are preferred
SHARD = "-of-"  # in the file names of shards
AUTOENCODER_OPTION = "model.first_stage_config.params.ckpt_path"


def unexpected(what: str, kind: Kind, option: str) -> UserError:
    """Return the error for a path that does not contain the expected `kind` of weights.

    Args:
        what: a clause that says what was found instead.
        kind: the expected kind of weights.
        option: the option that gave the path.
    """
    return UserError(f"{option}: {what}; it must be {_EXPECTED[kind]}")


def no_sat_format(found: Weights, kind: Kind) -> UserError:
    """Return the error for a file whose tensor names do not belong to `kind` in SAT format."""
    first = next(iter(found.file.tensors()))
    what = f"{found.path} holds no {_NOUNS[kind]} in SAT format (first key: {first!r})"
    return unexpected(what, kind, found.option)


@contextmanager
def looking_up(given: str | Path, option: str) -> Iterator[None]:
    """Turn errors of looking up a path (name too long, folder not readable, …) into UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}: {str(given)[:LONGEST_QUOTE]!r} cannot be looked up ({error.strerror}); "
            "check the path and its permissions"
        ) from None


def find_transformer(load: str | Path | Weights, *, option: str = "load") -> Weights:
    """Find the weights of a transformer.

    Args:
        load: a file, a folder with the file ``latest``, or the diffusers folder of a pipeline or of
            its transformer.
        option: the option that gave the path, for messages.

    Raises:
        UserError: the path contains no transformer, or a part of it is missing.
    """
    return _find(load, "load", option)


def find_lora(path: str | Path | Weights, *, option: str = "lora") -> Weights:
    """Find the file of a LoRA.

    Args:
        path: the file itself, or its folder as SAT, diffusers or peft writes it.
        option: the option that gave the path, for messages.

    Raises:
        UserError: the path contains no LoRA.
    """
    return _find(path, "lora", option)


def find_autoencoder(path: str | Path | Weights, *, option: str = AUTOENCODER_OPTION) -> Weights:
    """Find the weights of the autoencoder, in SAT's or diffusers' format.

    Args:
        path: a file, the folder that contains ``3d-vae.pt``, or the diffusers folder of a pipeline
            or of its autoencoder.
        option: the option that gave the path, for messages.

    Raises:
        UserError: the path contains no autoencoder, or a part of it is missing.
    """
    return _find(path, "autoencoder", option)


def _find(given: str | Path | Weights, kind: Kind, option: str) -> Weights:
    """Find weights: a file, in a folder, in the subfolder that ``latest`` names, or of diffusers.

    Args:
        given: the path; weights that were found before are returned unchanged.
        kind: the kind of weights to look for; not "t5".
        option: the option that gave the path, for messages.

    Raises:
        UserError: no weights of this kind were found; the message says what is expected.
    """
    if isinstance(given, Weights):
        return given
    with looking_up(given, option):
        path = expanded(given)
        if path.is_file():
            return Weights.of_file(given, path, option)
        if not path.is_dir():
            raise unexpected(f"{path} does not exist", kind, option)
        folder = path if kind == "autoencoder" else _tagged_folder(path, option)
        for name in _FILES[kind]:
            if (folder / name).is_file():
                return Weights.of_file(given, folder / name, option)
        if kind == "lora":
            if any((path / name).is_file() for name in ("model_index.json", "config.json")):
                raise is_whole(path, option)
        elif folder == path and (found := find_diffusers_part(path, _PARTS[kind])):
            return replace(found, given=given, option=option)
        elif kind == "load" and find_foreign_file(path):
            raise is_no_base(path, option)
        elif kind == "load" and (path / "transformer").is_dir():
            what = f"{path} is the folder of a whole model; give {path / 'transformer'}"
            raise unexpected(what, kind, option)
    raise unexpected(f"{folder / _FILES[kind][0]} does not exist", kind, option)


def _tagged_folder(path: Path, option: str) -> Path:
    """Return the subfolder named in the file ``latest`` in `path`; `path` if there is no such file.

    Raises:
        UserError: ``latest`` contains more than the name of a folder.
    """
    if not (path / "latest").is_file():
        return path
    tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if any(mark in tag for mark in "/\n\0"):
        quoted = repr(tag[:LONGEST_QUOTE])
        reason = f"holds {quoted} instead of the name of a folder next to it"
        raise damaged(f"{option}: {path / 'latest'}", reason)
    return path / tag


def is_no_base(path: Path, option: str) -> UserError:
    """Return the error for a LoRA that was given instead of a whole model."""
    return UserError(
        f"{path} is a LoRA, not a whole model; {option} must name its base model, and --lora this "
        "LoRA (to continue its training run, use --resume)"
    )


def find_foreign_file(folder: str | Path) -> Path | None:
    """Return the LoRA file in a folder of diffusers or peft; None if `folder` is not one."""
    folder = expanded(folder)
    if os.path.isfile(os.path.join(folder, "latest")):  # a training run of this code
        return None
    paths = (os.path.join(folder, name) for name in _LORA_FILES)
    return next((Path(path) for path in paths if os.path.isfile(path)), None)


def is_whole(path: str | Path, option: str) -> UserError:
    """Return the error for a whole model that was given instead of a LoRA."""
    return unexpected(f"{path} is a whole model, not a LoRA", "lora", option)


def find_tokenizer(*folders: Path) -> Path | None:
    """Return the first ``spiece.model`` in `folders`, or the first ``tokenizer.json``, or None."""
    paths = (folder / name for name in TOKENIZER_FILES for folder in folders)
    return next((path for path in paths if path.is_file()), None)


@dataclass(frozen=True, eq=False)
class T5Files(Weights):
    """The files of a text encoder: a folder with config.json and weights, and a tokenizer file."""

    tokenizer: Path = field(kw_only=True)

    @property
    def indices(self) -> list[Path]:
        """A list with the path of the shards' index; empty if the weights are not sharded.

        An index next to weights in a single file is ignored, because it belongs to other weights.
        """
        if not any(SHARD in file.path.name for file in self.files):
            return []
        suffix = self.files[0].path.suffix
        return _preferred(p for p in self.path.glob("*.index*.json") if f"{suffix}." in p.name)


def _preferred(paths: Iterable[Path]) -> list[Path]:
    """Return the paths sorted; half-precision variants are left out if there are other files."""
    found = sorted(paths)
    return [path for path in found if VARIANT not in path.name] or found


def find_t5(model_dir: str | Path | T5Files, *, option: str = "model_dir") -> T5Files:
    """Find the files of a text encoder.

    Args:
        model_dir: a T5 folder from Hugging Face, the folder of a diffusers pipeline, or its
            subfolder ``text_encoder`` with ``tokenizer`` next to it.
        option: the option that gave the path, for messages.

    Raises:
        UserError: the folder, its config, its tokenizer or some of its weights are missing, a file
            is clearly the wrong one (see `open_file`), or the config belongs to another model.
    """
    if isinstance(model_dir, T5Files):
        return model_dir
    with looking_up(model_dir, option):
        folder = expanded(model_dir)
        folder = find_in_pipeline(folder, "text_encoder") or folder
        config = _t5_config(folder, option)
        here = f"the T5 folder {folder}"
        tokenizer = find_tokenizer(folder, folder.parent / "tokenizer")
        if tokenizer is None:
            place = "(in diffusers' layout the folder tokenizer is next to it)"
            raise incomplete(here, f"{' or '.join(TOKENIZER_FILES)} {place}")
        weights = _preferred(folder.glob("*.safetensors"))
        weights = weights or _preferred(folder.glob("pytorch_model*.bin"))
        if not weights:
            names = "weights (*.safetensors or pytorch_model*.bin; tf_model.h5 is not used)"
            raise incomplete(here, names)
        # Only small files can be git-lfs pointers. Large files are checked later, when read.
        small = [path for path in weights if path.stat().st_size <= _LARGEST_POINTER]
        for path in (tokenizer, *small):
            check_kind(path)
        found = tuple(map(WeightFile, weights))
        beside = (folder / "config.json", tokenizer)
        files = T5Files(model_dir, option, folder, found, beside, config, tokenizer=tokenizer)
        for index in files.indices:
            find_shards(index, here)
    return files


def _t5_config(folder: Path, option: str) -> dict[str, Any]:
    """Return the content of a T5 folder's ``config.json``.

    Raises:
        UserError: the folder or the file is missing, or the config belongs to another model.
    """
    if not folder.is_dir():
        raise unexpected(f"{str(folder)!r} is not a folder", "t5", option)
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" not in names:
        holds = first_of(names) or "nothing"
        what = f"the T5 folder {folder} lacks config.json (it holds {holds})"
        raise unexpected(what, "t5", option)
    config = read_json(folder / "config.json")
    kind = config.get("model_type", config.get("_class_name"))
    if kind != "t5":
        quoted = repr(str(kind)[:LONGEST_QUOTE])
        raise unexpected(f"{folder} holds {quoted}, not a T5 encoder", "t5", option)
    return config
