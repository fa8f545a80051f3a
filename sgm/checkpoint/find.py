"""Where the weights that a path names are: of the transformer, a LoRA, the autoencoder, T5.

Only names and JSON files are looked at, without PyTorch. What is found is one object, which the
functions that check and load weights take; given such an object, these functions return it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgm.checkpoint.diffusers_folder import PartFolder, find_diffusers_part, find_in_pipeline
from sgm.checkpoint.weight_file import FileState, WeightFile, check_kind, read_json, state_of
from sgm.errors import UserError

MODEL_FILES = ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.safetensors")
SAT_FILE = "3d-vae.pt"  # the autoencoder, as published
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_LORA_FILES = (
    DIFFUSERS_FILE,
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats
_NUM_NAMED = 3  # names that a message repeats
_FOREIGN_FILES = "pytorch_lora_weights.safetensors or adapter_model.safetensors"
Kind = Literal["load", "lora"]
EXPECTED: Mapping[Kind, str] = {
    "load": "the transformer's folder (with the file 'latest' in it), its .pt file or a diffusers "
    "folder; README tells where to get the weights",
    "lora": "a LoRA: the folder of a run (with the file 'latest' in it), of one of its "
    f"checkpoints, a file, or what diffusers or peft wrote: {_FOREIGN_FILES}, or its folder",
}
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
VARIANT = ".fp16"  # in the names of weight files; an index is looked for without it
SHARD = "-of-"  # in the names of weight files that are parts of a whole
AUTOENCODER_OPTION = "model.first_stage_config.params.ckpt_path"
EXPECTED_AUTOENCODER = (
    "the autoencoder's weights: 3d-vae.pt itself, or a diffusers folder; README tells where to get "
    "them"
)


class _Found:
    """Files that were found together.

    `files` are those that hold tensors, `sources` all that the tensors depend on, in a fixed order.
    """

    files: tuple[WeightFile, ...]
    sources: list[Path]

    def state(self) -> list[FileState | None]:
        """What changes where a file is written again."""
        return [state_of(path) for path in self.sources]

    def is_unchanged(self, since: list[FileState | None]) -> bool:
        """Whether no file was written again since this `state`, or since it was read."""
        return self.state() == since and all(file.is_as_read for file in self.files)

    def keep(self) -> None:
        """Keep the files mapped from now on, so that they are not read again when needed again."""
        for file in self.files:
            file.kept = True

    def release(self) -> None:
        """Give the mapped files back; they are read again when tensors are asked for."""
        for file in self.files:
            file.release()


@dataclass(frozen=True, eq=False)
class Weights(_Found):
    """Weights that were found: a file of SAT format or of a LoRA, or a folder in diffusers' layout.

    Args:
        given: the path as the user gave it.
        option: where it was given, for messages.
        path: of the file, or of the part's folder.
        folder: the part, where it is a folder.
        files: those that hold tensors.
    """

    given: str | Path
    option: str
    path: Path
    folder: PartFolder | None
    files: tuple[WeightFile, ...]

    @classmethod
    def of_file(cls, given: str | Path, path: Path, option: str) -> Weights:
        """Weights in one file."""
        return cls(given, option, path, None, (WeightFile(path),))

    @classmethod
    def of_folder(cls, given: str | Path, folder: PartFolder, option: str) -> Weights:
        """Weights in a folder in diffusers' layout."""
        return cls(given, option, folder.folder, folder, folder.files)

    @property
    def sources(self) -> list[Path]:
        """One file, or index and shards."""
        index = self.folder.index if self.folder else None
        return [*filter(None, [index]), *(file.path for file in self.files)]

    def __str__(self) -> str:
        return str(self.given)

    def __repr__(self) -> str:
        return repr(str(self.given))  # in messages it stands for the path


def _not_readable(given: str | Path, option: str, error: OSError) -> UserError:
    # A name that is too long, a folder of another user …
    return UserError(
        f"{option}: {str(given)[:_LONGEST_QUOTE]!r} cannot be looked up ({error.strerror}); check "
        "the path and its permissions"
    )


def find_transformer(
    load: str | Path | Weights, *, kind: Kind = "load", option: str | None = None
) -> Weights:
    """The file that `load` means: a file itself, a folder with ``latest``, or the folder it names.

    Args:
        load: the path.
        kind: what is looked for. For ``load`` it may also be a diffusers folder, of a pipeline or
            of its transformer.
        option: where the user gave the path, for messages; None: the name of `kind`.

    Raises:
        UserError: there is no such file; says which one was looked for.
    """
    if isinstance(load, Weights):
        return load
    option = option or kind
    try:
        found = _find_transformer(load, kind, option)
    except OSError as error:
        raise _not_readable(load, option, error) from None
    if isinstance(found, PartFolder):
        return Weights.of_folder(load, found, option)
    return Weights.of_file(load, found, option)


def _find_transformer(load: str | Path, kind: Kind, option: str) -> Path | PartFolder:
    path = Path(os.path.expanduser(load))
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{option}: {load} does not exist; it must be {EXPECTED[kind]}")
    folder = path
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if any(mark in tag for mark in "/\n\0"):
            raise UserError(
                f"{option}: {path}/latest holds {tag[:_LONGEST_QUOTE]!r}, not just the name of a "
                "folder beside it; write or download it again"
            )
        folder = path / tag
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    if kind == "load" and folder == path:
        found = find_diffusers_part(path, "transformer")
        if found is not None:
            return found
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


def is_no_base(path: Path, option: str) -> UserError:
    """The error for a LoRA in the place of a whole model."""
    return UserError(
        f"{path} is a LoRA, not a whole model; {option} must name its base model, and --lora this "
        "(to go on with its run: --resume)"
    )


def find_foreign_file(folder: str | Path) -> Path | None:
    """The file of a LoRA folder of diffusers or peft; None if `folder` is no such folder."""
    folder = os.path.expanduser(folder)
    if os.path.isfile(os.path.join(folder, "latest")):  # a run of this code
        return None
    paths = (os.path.join(folder, name) for name in _LORA_FILES)
    return next((Path(path) for path in paths if os.path.isfile(path)), None)


def find_lora(path: str | Path | Weights, *, option: str = "lora") -> Weights:
    """The file that a LoRA's `path` means: itself, or in a folder of SAT, diffusers or peft.

    Raises:
        UserError: no LoRA is there.
    """
    if isinstance(path, Weights):
        return path
    folder = Path(os.path.expanduser(path))
    file = find_foreign_file(folder)
    if file is not None:
        return Weights.of_file(path, file, option)
    if os.path.isfile(folder / "model_index.json") or os.path.isfile(folder / "config.json"):
        raise is_whole(path, option)
    return find_transformer(path, kind="lora", option=option)


def is_whole(path: str | Path, option: str) -> UserError:
    """The error for a whole model in the place of a LoRA."""
    hint = f"{option} must name a LoRA, or a run that trained one"
    if option == "lora":  # of a command that takes a whole model too
        hint = "name it in load, a LoRA in lora"
    return UserError(f"{path} is a whole model, not a LoRA; {hint}")


def find_autoencoder(path: str | Path | Weights, *, option: str = AUTOENCODER_OPTION) -> Weights:
    """The file of SAT format that `path` means, or diffusers' autoencoder in it.

    Args:
        path: a file, the folder of ``3d-vae.pt``, or a diffusers folder, of a pipeline or of its
            autoencoder.
        option: where the user gave the path, for messages.

    Raises:
        UserError: nothing of the kind is there, or a part of it is missing.
    """
    if isinstance(path, Weights):
        return path
    place = Path(os.path.expanduser(path))
    for file in (place, place / SAT_FILE):
        if os.path.isfile(file):
            return Weights.of_file(path, file, option)
    if not os.path.isdir(place):
        raise UserError(f"{option}: {place} does not exist; it must be {EXPECTED_AUTOENCODER}")
    folder = find_diffusers_part(place, "vae")
    if folder is None:
        raise UserError(
            f"{place} is a folder without an autoencoder in it; {option} must be "
            f"{EXPECTED_AUTOENCODER}"
        )
    return Weights.of_folder(path, folder, option)


def find_tokenizer(*folders: Path) -> Path | None:
    """The first ``spiece.model`` in `folders`, or else the first ``tokenizer.json``, or None."""
    paths = (folder / name for name in TOKENIZER_FILES for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights that are used, sorted; empty where there are none."""
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sorted([path for path in weights if VARIANT not in path.name] or weights)


@dataclass(frozen=True, eq=False)
class T5Files(_Found):
    """A text encoder's folder, its config.json, and its files of tokenizer and weights."""

    folder: Path
    config: Mapping[str, Any]
    tokenizer: Path
    files: tuple[WeightFile, ...]

    @property
    def weights(self) -> list[Path]:
        """The paths of the files of weights."""
        return [file.path for file in self.files]

    @property
    def sources(self) -> list[Path]:
        """Its config.json, the tokenizer's file and those of weights."""
        return [self.folder / "config.json", self.tokenizer, *self.weights]


def find_t5(model_dir: str | Path | T5Files, *, option: str = "model_dir") -> T5Files:
    """The files of a text encoder.

    Args:
        model_dir: a T5 folder of Hugging Face's, the folder ``text_encoder`` of a diffusers
            pipeline, with ``tokenizer`` beside it, or the pipeline's.
        option: where the user gave the path, for messages.

    Raises:
        UserError: the folder, its config, its tokenizer or some of its weights are missing, or
            its config is not T5's.
    """
    if isinstance(model_dir, T5Files):
        return model_dir
    try:
        return _find_t5(Path(model_dir).expanduser(), option)
    except OSError as error:
        raise _not_readable(model_dir, option, error) from None


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
    files = T5Files(folder, config, tokenizer, tuple(map(WeightFile, weights)))
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


def _check_shards(files: T5Files) -> None:
    """Raise UserError where a shard is missing that the list of them names."""
    for index in shard_indices(files):
        shards = read_json(index).get("weight_map")
        for name in sorted(set(map(str, shards.values() if isinstance(shards, dict) else ()))):
            if not (files.folder / Path(name).name).is_file():
                raise UserError(
                    f"the T5 folder {files.folder} lacks the shard {name} that {index.name} names; "
                    "copy it there from the original"
                )


def shard_indices(files: T5Files) -> list[Path]:
    """The index of the shards that the weights consist of: one path, or no path.

    One that was left beside weights in a single file does not belong to them.
    """
    if not any(SHARD in path.name for path in files.weights):
        return []
    suffix = files.weights[0].suffix
    found = [path for path in files.folder.glob("*.index*.json") if f"{suffix}." in path.name]
    return sorted([path for path in found if VARIANT not in path.name] or found)
