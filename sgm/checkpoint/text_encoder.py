"""Carrying a T5 text encoder from folder to folder: nothing in it changes, so files are copied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sgm.checkpoint.diffusers_folder import read_json
from sgm.errors import UserError
from sgm.inference.progress import Progress
from sgm.modules.encoders.modules import T5Files, find_t5

_TOKENIZER_FILES = ("spiece.model", "tokenizer_config.json", "special_tokens_map.json")
_MORE_TOKENIZER_FILES = ("added_tokens.json", "tokenizer.json")
_VARIANT = ".fp16"  # in the names of weight files; an index is looked for without it


def find_whole_t5(folder: str | Path, *, option: str) -> T5Files:
    """As `find_t5`, and every shard that an index names is there.

    Raises:
        UserError: something is absent or broken.
    """
    files = find_t5(folder, option=option)
    for index in _indices(files):
        shards = read_json(index).get("weight_map")
        for name in sorted(set(map(str, shards.values() if isinstance(shards, dict) else ()))):
            if not (files.folder / Path(name).name).is_file():
                raise UserError(
                    f"the T5 folder {files.folder} lacks the shard {name} that {index.name} names; "
                    "copy it there from the original"
                )
    return files


def _indices(files: T5Files) -> list[Path]:
    """The lists of shards that belong to the weights, of which there is one or none."""
    suffix = files.weights[0].suffix
    found = [path for path in files.folder.glob("*.index*.json") if f"{suffix}." in path.name]
    return sorted([path for path in found if _VARIANT not in path.name] or found)


def copy_text_encoder(files: T5Files, folder: Path, *, link: bool) -> None:
    """``config.json`` and the weights, into a new folder.

    Args:
        files: as `find_whole_t5` gives them.
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
            is_shard = "-of-" in source.name
            name = source.name if is_shard else source.name.replace(_VARIANT, "")
            place(source, folder / name, link=link)
            progress.step(name)


def copy_tokenizer_files(files: T5Files, folder: Path) -> None:
    """The sentencepiece model and what libraries keep beside it, into the folder `folder`."""
    for name in (*_TOKENIZER_FILES, *_MORE_TOKENIZER_FILES):
        source = files.tokenizer.with_name(name)
        if source.is_file():
            place(source, folder / name, link=False)


def place(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file (what it leads to, if it is a link), or make a link to it."""
    if link:
        os.symlink(os.path.realpath(source), target)
    else:
        shutil.copyfile(source, target)
