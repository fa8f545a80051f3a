"""Finding weights by their paths: of the transformer, a LoRA, the autoencoder and T5.

Only names and JSON files are read, without PyTorch. Each function returns one object, which the
functions that check and load weights accept; given such an object, it returns the object itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgm.checkpoint.diffusers_folder import (
    PartFolder,
    find_diffusers_part,
    find_in_pipeline,
    no_weights,
    read_index,
)
from sgm.checkpoint.weight_file import (
    FileState,
    WeightFile,
    check_kind,
    damaged,
    incomplete,
    read_json,
    state_of,
)
from sgm.errors import UserError, first_of

MODEL_FILES = ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.safetensors")
SAT_FILE = "3d-vae.pt"  # the autoencoder, as published
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_LORA_FILES = (
    DIFFUSERS_FILE,
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_LARGEST_POINTER = 1024  # bytes, by the specification of git-lfs
_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats
_FOREIGN_FILES = "pytorch_lora_weights.safetensors or adapter_model.safetensors"
Kind = Literal["load", "lora", "autoencoder", "t5"]
_EXPECTED: Mapping[Kind, str] = {
    "load": "the transformer's folder (with the file 'latest' in it), its .pt file or a diffusers "
    "folder; README tells where to get the weights",
    "lora": "a LoRA: the folder of a run (with the file 'latest' in it), of one of its "
    f"checkpoints, a file, or a LoRA of diffusers or peft: {_FOREIGN_FILES}, or its folder",
    "autoencoder": "the autoencoder's weights: 3d-vae.pt itself, or a diffusers folder; README "
    "tells where to get them",
    "t5": "the T5 folder with config.json and T5's weights in it (for the 2B model a clone of "
    "https://huggingface.co/google/t5-v1_1-xxl), or a diffusers pipeline's",
}
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
VARIANT = ".fp16"  # in the names of weight files; an index without it is preferred
SHARD = "-of-"  # in the names of weight files that are shards
AUTOENCODER_OPTION = "model.first_stage_config.params.ckpt_path"


def unexpected(what: str, kind: Kind, option: str) -> UserError:
    """The error for a path at which there is something else than `kind`.

    Args:
        what: a clause that says what is there.
        kind: what is looked for.
        option: the option that gave the path.
    """
    return UserError(f"{option}: {what}; it must be {_EXPECTED[kind]}")


@dataclass(frozen=True, eq=False)
class _Found:
    """Files that belong together.

    `files` are those that hold tensors, `beside` other files that the tensors depend on.
    """

    files: tuple[WeightFile, ...]
    beside: tuple[Path, ...]

    @property
    def sources(self) -> list[Path]:
        """All files that the tensors depend on, in a fixed order."""
        return [*self.beside, *(file.path for file in self.files)]

    def state(self) -> list[FileState | None]:
        """The state of each source, which changes when the file is written again."""
        return [state_of(path) for path in self.sources]

    def is_unchanged(self, since: list[FileState | None]) -> bool:
        """Whether no file was written again since this `state`, or since it was read."""
        return self.state() == since and all(file.is_as_read for file in self.files)

    def keep(self) -> None:
        """Keep the files mapped from now on, so that no later use reads them again."""
        for file in self.files:
            file.kept = True

    def release(self) -> None:
        """Drop the mappings of the files; the next use of tensors reads them again."""
        for file in self.files:
            file.release()


@dataclass(frozen=True, eq=False)
class Weights(_Found):
    """Weights that were found: a file of SAT format or of a LoRA, or a folder in diffusers' layout.

    Args:
        given: the path as the user gave it.
        option: the option that gave it, for messages.
        path: of the file, or of the part's folder.
        folder: the part, if it is a folder.
    """

    given: str | Path
    option: str
    path: Path
    folder: PartFolder | None

    @classmethod
    def of_file(cls, given: str | Path, path: Path, option: str) -> Weights:
        """Weights in one file."""
        return cls((WeightFile(path),), (), given, option, path, None)

    @classmethod
    def of_folder(cls, given: str | Path, folder: PartFolder, option: str) -> Weights:
        """Weights in a folder in diffusers' layout."""
        beside = (folder.index,) if folder.index else ()
        return cls(folder.files, beside, given, option, folder.folder, folder)

    def __str__(self) -> str:
        return str(self.given)

    def __repr__(self) -> str:
        return repr(str(self.given))  # in messages it stands for the path


@contextmanager
def looking_up(given: str | Path, option: str) -> Iterator[None]:
    """Around looking up a path: UserError if its name is too long, a folder is not readable …"""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}: {str(given)[:_LONGEST_QUOTE]!r} cannot be looked up ({error.strerror}); "
            "check the path and its permissions"
        ) from None


def find_transformer(
    load: str | Path | Weights, *, kind: Kind = "load", option: str | None = None
) -> Weights:
    """Find the file that `load` names: the file itself, or one in a folder with ``latest``.

    Args:
        load: the path.
        kind: what is looked for. For ``load`` the path may also be a diffusers folder, of a
            pipeline or of its transformer.
        option: the option that gave the path, for messages; None: the name of `kind`.

    Raises:
        UserError: there is no such file; the message names the expected one.
    """
    if isinstance(load, Weights):
        return load
    option = option or kind
    with looking_up(load, option):
        path = Path(os.path.expanduser(load))
        if path.is_file():
            return Weights.of_file(load, path, option)
        if not path.is_dir():
            raise unexpected(f"{load} does not exist", kind, option)
        folder = _tagged_folder(path, option)
        for name in MODEL_FILES:
            if (folder / name).is_file():
                return Weights.of_file(load, folder / name, option)
        if kind == "load" and folder == path:
            if found := find_diffusers_part(path, "transformer"):
                return Weights.of_folder(load, found, option)
            if find_foreign_file(path):
                raise is_no_base(path, option)
            if any((path / "transformer" / name).is_file() for name in ("latest", *MODEL_FILES)):
                raise UserError(
                    f"{option}: {path} is the folder of a whole model in SAT's layout; name "
                    f"{path / 'transformer'}"
                )
    or_else = "a diffusers folder with its config.json" if kind == "load" else _FOREIGN_FILES
    raise UserError(
        f"{option}: {folder / MODEL_FILES[0]} does not exist; expected are {path}/latest with the "
        f"name of a folder, and {MODEL_FILES[0]} in that folder; or {or_else}"
    )


def _tagged_folder(path: Path, option: str) -> Path:
    """The folder that the file ``latest`` in `path` names; `path` itself without such a file."""
    if not (path / "latest").is_file():
        return path
    tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if any(mark in tag for mark in "/\n\0"):
        quoted = repr(tag[:_LONGEST_QUOTE])
        reason = f"holds {quoted}, not just the name of a folder beside it"
        raise damaged(f"{option}: {path / 'latest'}", reason)
    return path / tag


def is_no_base(path: Path, option: str) -> UserError:
    """The error for a LoRA in the place of a whole model."""
    return UserError(
        f"{path} is a LoRA, not a whole model; {option} must name its base model, and --lora this "
        "(to go on with its run: --resume)"
    )


def find_foreign_file(folder: str | Path) -> Path | None:
    """The file of a LoRA folder of diffusers or peft; None if `folder` is not such a folder."""
    folder = os.path.expanduser(folder)
    if os.path.isfile(os.path.join(folder, "latest")):  # a run of this code
        return None
    paths = (os.path.join(folder, name) for name in _LORA_FILES)
    return next((Path(path) for path in paths if os.path.isfile(path)), None)


def find_lora(path: str | Path | Weights, *, option: str = "lora") -> Weights:
    """Find the file of a LoRA: `path` itself, or a file in a folder of SAT, diffusers or peft.

    Args:
        path: the path.
        option: the option that gave it, for messages.

    Raises:
        UserError: no LoRA is there.
    """
    if isinstance(path, Weights):
        return path
    if file := find_foreign_file(path):
        return Weights.of_file(path, file, option)
    folder = os.path.expanduser(path)
    if any(os.path.isfile(f"{folder}/{name}") for name in ("model_index.json", "config.json")):
        raise is_whole(path, option)
    return find_transformer(path, kind="lora", option=option)


def is_whole(path: str | Path, option: str) -> UserError:
    """The error for a whole model in the place of a LoRA."""
    hint = f"{option} must name a LoRA, or a run that trained one"
    if option == "lora":  # of a command that takes a whole model too
        hint = "name it in load, a LoRA in lora"
    return UserError(f"{path} is a whole model, not a LoRA; {hint}")


def find_autoencoder(path: str | Path | Weights, *, option: str = AUTOENCODER_OPTION) -> Weights:
    """Find the autoencoder's file of SAT format, or diffusers' folder of it.

    Args:
        path: a file, the folder of ``3d-vae.pt``, or a diffusers folder, of a pipeline or of its
            autoencoder.
        option: the option that gave the path, for messages.

    Raises:
        UserError: no autoencoder is there, or a part of it is missing.
    """
    if isinstance(path, Weights):
        return path
    place = Path(os.path.expanduser(path))
    for file in (place, place / SAT_FILE):
        if os.path.isfile(file):
            return Weights.of_file(path, file, option)
    if not os.path.isdir(place):
        raise unexpected(f"{place} does not exist", "autoencoder", option)
    folder = find_diffusers_part(place, "vae")
    if folder is None:
        raise unexpected(f"{place} is a folder without an autoencoder in it", "autoencoder", option)
    return Weights.of_folder(path, folder, option)


def find_tokenizer(*folders: Path) -> Path | None:
    """The first ``spiece.model`` in `folders`, or else the first ``tokenizer.json``, or None."""
    paths = (folder / name for name in TOKENIZER_FILES for folder in folders)
    return next((path for path in paths if path.is_file()), None)


@dataclass(frozen=True, eq=False)
class T5Files(_Found):
    """A text encoder's folder, its config.json, and its files of tokenizer and weights."""

    folder: Path
    config: Mapping[str, Any]
    tokenizer: Path

    @property
    def weights(self) -> list[Path]:
        """The paths of the files of weights."""
        return [file.path for file in self.files]


def find_t5(model_dir: str | Path | T5Files, *, option: str = "model_dir") -> T5Files:
    """Find the files of a text encoder.

    Args:
        model_dir: a T5 folder of Hugging Face's, the folder ``text_encoder`` of a diffusers
            pipeline, with ``tokenizer`` beside it, or the pipeline's.
        option: the option that gave the path, for messages.

    Raises:
        UserError: the folder, its config, its tokenizer or some of its weights are missing, a file
            is recognisably not the right one, or the config is not T5's.
    """
    if isinstance(model_dir, T5Files):
        return model_dir
    with looking_up(model_dir, option):
        folder = Path(model_dir).expanduser()
        folder = find_in_pipeline(folder, "text_encoder") or folder
        config = _t5_config(folder, option)
        here = f"the T5 folder {folder}"
        tokenizer = find_tokenizer(folder, folder.parent / "tokenizer")
        if tokenizer is None:
            places = " or ".join(TOKENIZER_FILES)
            raise incomplete(
                here, f"{places} (in diffusers' layout the folder tokenizer lies beside it)"
            )
        weights = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
        weights = sorted([path for path in weights if VARIANT not in path.name] or weights)
        if not weights:
            names = "*.safetensors or pytorch_model*.bin; tf_model.h5 is not used"
            raise no_weights(here, names)
        # A pointer of git-lfs is small. Large files are opened later, when they are read.
        small = [path for path in weights if path.stat().st_size <= _LARGEST_POINTER]
        for path in (tokenizer, *small):
            check_kind(path)
        files = T5Files(
            files=tuple(map(WeightFile, weights)),
            beside=(folder / "config.json", tokenizer),
            folder=folder,
            config=config,
            tokenizer=tokenizer,
        )
        for index in shard_indices(files):
            read_index(index, here)
    return files


def _t5_config(folder: Path, option: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise unexpected(f"{str(folder)!r} is not a folder", "t5", option)
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" in names:
        config = read_json(folder / "config.json")
        kind = config.get("model_type", config.get("_class_name"))
        if kind != "t5":
            quoted = repr(str(kind)[:_LONGEST_QUOTE])
            raise unexpected(f"{folder} holds {quoted}, not a T5 encoder", "t5", option)
        return config
    if {"3d-vae.pt", "latest", "transformer", "model_index.json"} & names:
        shown = first_of(sorted(names))
        raise unexpected(f"{folder} is not a T5 folder (it holds {shown})", "t5", option)
    raise incomplete(f"the T5 folder {folder}", "config.json")


def shard_indices(files: T5Files) -> list[Path]:
    """The index of the shards in a list; an empty list if the weights are not in shards.

    An index that was left beside weights in a single file does not belong to them.
    """
    if not any(SHARD in path.name for path in files.weights):
        return []
    suffix = files.weights[0].suffix
    found = [path for path in files.folder.glob("*.index*.json") if f"{suffix}." in path.name]
    return sorted([path for path in found if VARIANT not in path.name] or found)
