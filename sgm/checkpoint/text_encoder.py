"""Carrying a T5 text encoder from folder to folder: nothing in it changes, so files are copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.checkpoint.diffusers_folder import find_in_pipeline, read_json
from sgm.checkpoint.reading import check_kind, check_weight_file
from sgm.errors import UserError
from sgm.inference.progress import Progress

TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VARIANT = ".fp16"  # in the names of weight files; an index is looked for without it
_SHARD = "-of-"  # in the names of weight files that are parts of a whole
_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats
_NUM_NAMED = 3  # names that a message repeats


def find_tokenizer(*folders: Path) -> Path | None:
    """The first ``spiece.model`` in `folders`, or else the first ``tokenizer.json``, or None."""
    paths = (folder / name for name in TOKENIZER_FILES for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights that are used, sorted; empty where there are none."""
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sorted([path for path in weights if _VARIANT not in path.name] or weights)


@dataclass(frozen=True)
class T5Files:
    """A text encoder's folder, its config.json, and its files of tokenizer and weights."""

    folder: Path
    config: Mapping[str, Any]
    tokenizer: Path
    weights: Sequence[Path]


def find_t5(model_dir: str | Path, *, option: str = "model_dir") -> T5Files:
    """The files of a text encoder, after saying what is absent or broken, before any is loaded.

    Args:
        model_dir: a T5 folder of Hugging Face's, the folder ``text_encoder`` of a diffusers
            pipeline, with ``tokenizer`` beside it, or the pipeline's.
        option: where the user gave the path, for messages.

    Raises:
        UserError: the folder, its config, its tokenizer or its weights, or some of these, are
            absent, or one of its files is not what its name says.
    """
    try:
        return _find_t5(Path(model_dir).expanduser(), option)
    except OSError as error:  # a name that is too long, a folder of somebody else …
        raise UserError(
            f"{option}: {str(model_dir)[:_LONGEST_QUOTE]!r} cannot be looked up "
            f"({error.strerror}); check the path and its permissions"
        ) from None


def _find_t5(folder: Path, option: str) -> T5Files:
    folder = find_in_pipeline(folder, "text_encoder") or folder
    if not folder.is_dir():
        raise UserError(
            f"{option} {str(folder)!r} is not a folder; it must name the T5 folder "
            "(for the 2B model a clone of https://huggingface.co/google/t5-v1_1-xxl)"
        )
    tokenizer = find_tokenizer(folder, folder.parent / "tokenizer")
    if not (folder / "config.json").is_file():
        raise _without_config(folder, option)
    if tokenizer is None:
        raise UserError(
            f"the T5 folder {folder} lacks {' or '.join(TOKENIZER_FILES)}; copy it there from the "
            "original, or in diffusers' layout copy the folder tokenizer to lie beside it"
        )
    check_kind(tokenizer)
    config = read_json(folder / "config.json")
    kind = config.get("model_type", config.get("_class_name"))
    if kind != "t5":
        raise UserError(
            f"{folder} holds {str(kind)[:_LONGEST_QUOTE]!r}, not a T5 encoder; {option} must name "
            "the T5 folder, or the folder text_encoder of a diffusers pipeline"
        )
    weights = _weight_files(folder)
    if not weights:
        raise UserError(
            f"the T5 folder {folder} holds no weights (*.safetensors or pytorch_model*.bin; "
            "tf_model.h5 is not used); in a git clone run 'git lfs pull'"
        )
    for path in weights:
        check_weight_file(path)
    files = T5Files(folder, config, tokenizer, weights)
    _check_shards(files)
    return files


def _without_config(folder: Path, option: str) -> UserError:
    names = {entry.name for entry in folder.iterdir()}
    if {"3d-vae.pt", "latest", "transformer", "model_index.json"} & names:
        shown = ", ".join(sorted(names)[:_NUM_NAMED])
        return UserError(
            f"{folder} is no T5 folder (it holds {shown}); {option} must name the one with "
            "config.json and T5's weights in it"
        )
    return UserError(f"the T5 folder {folder} lacks config.json; copy it there from the original")


def embedding_files(model_dir: str) -> list[Path]:
    """The files of a T5 folder that embeddings depend on, in a fixed order.

    Raises:
        UserError: the folder is not a T5 folder.
    """
    files = find_t5(model_dir)
    return [files.folder / "config.json", files.tokenizer, *files.weights]


def _check_shards(files: T5Files) -> None:
    """Raise UserError where a shard is absent that the list of them names."""
    for index in _indices(files):
        shards = read_json(index).get("weight_map")
        for name in sorted(set(map(str, shards.values() if isinstance(shards, dict) else ()))):
            if not (files.folder / Path(name).name).is_file():
                raise UserError(
                    f"the T5 folder {files.folder} lacks the shard {name} that {index.name} names; "
                    "copy it there from the original"
                )


def _indices(files: T5Files) -> list[Path]:
    """The lists of shards that belong to the weights, of which there is one or none.

    One that was left beside weights in a single file does not belong to them.
    """
    if not any(_SHARD in path.name for path in files.weights):
        return []
    suffix = files.weights[0].suffix
    found = [path for path in files.folder.glob("*.index*.json") if f"{suffix}." in path.name]
    return sorted([path for path in found if _VARIANT not in path.name] or found)


def copy_text_encoder(files: T5Files, folder: Path, *, link: bool) -> None:
    """``config.json`` and the weights, into a new folder.

    Args:
        files: as `find_t5` gives them.
        folder: is made; to be within `new_folder`.
        link: make symbolic links instead of copies.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [files.folder / "config.json", *_indices(files), *files.weights]
    with Progress(len(sources), unit="file") as progress:
        for source in sources:
            # Shards keep the names that the index has for them.
            is_shard = _SHARD in source.name
            name = source.name if is_shard else source.name.replace(_VARIANT, "")
            place(source, folder / name, link=link)
            progress.step(name)


def copy_tokenizer_files(files: T5Files, folder: Path) -> None:
    """The file of the tokenizer and what libraries keep beside it, into the folder `folder`."""
    for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        source = files.tokenizer.with_name(name)
        if source.is_file():
            place(source, folder / name, link=False)


def place(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file (what it leads to, if it is a link), or make a link to it."""
    if link:
        os.symlink(os.path.realpath(source), target)
    else:
        shutil.copyfile(source, target)
