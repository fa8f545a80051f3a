"""The T5 text encoder: its folder, what must be in it, and its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgm.checkpoint.diffusers_folder import find_in_pipeline, read_json
from sgm.checkpoint.reading import check_kind, check_weight_file, read_checkpoint, tensors_of
from sgm.checkpoint.strict_loading import differences
from sgm.errors import UserError, first_of
from sgm.offload import stream_weights

logger = logging.getLogger(__name__)


TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
VARIANT = ".fp16"  # in the names of weight files; an index is looked for without it
SHARD = "-of-"  # in the names of weight files that are parts of a whole
_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats
_NUM_NAMED = 3  # names that a message repeats


def find_tokenizer(*folders: Path) -> Path | None:
    """The first ``spiece.model`` in `folders`, or else the first ``tokenizer.json``, or None."""
    paths = (folder / name for name in TOKENIZER_FILES for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights that are used, sorted; empty where there are none."""
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sorted([path for path in weights if VARIANT not in path.name] or weights)


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
    for index in shard_indices(files):
        shards = read_json(index).get("weight_map")
        for name in sorted(set(map(str, shards.values() if isinstance(shards, dict) else ()))):
            if not (files.folder / Path(name).name).is_file():
                raise UserError(
                    f"the T5 folder {files.folder} lacks the shard {name} that {index.name} names; "
                    "copy it there from the original"
                )


def shard_indices(files: T5Files) -> list[Path]:
    """The lists of shards that belong to the weights, of which there is one or none.

    One that was left beside weights in a single file does not belong to them.
    """
    if not any(SHARD in path.name for path in files.weights):
        return []
    suffix = files.weights[0].suffix
    found = [path for path in files.folder.glob("*.index*.json") if f"{suffix}." in path.name]
    return sorted([path for path in found if VARIANT not in path.name] or found)


_TABLE_NAMES = ("encoder.embed_tokens.weight", "shared.weight")
_WIDE = ".wo.weight"
_AGAIN = "copy the folder from the original again"


def _build_encoder(files: T5Files) -> nn.Module:
    """The encoder of a T5 folder on the meta device, without values.

    Raises:
        UserError: transformers cannot build it.
    """
    # Imported here, since it takes seconds and only this function needs it.
    from transformers import T5Config, T5EncoderModel

    try:
        with torch.device("meta"):
            return T5EncoderModel(T5Config.from_dict(dict(files.config)))
    except Exception as error:  # transformers and what it checks values with raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the T5 folder {files.folder} cannot be loaded: {reason.rstrip('.')}; {_AGAIN}"
        ) from None


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a weight in an encoder of type `dtype`."""
    # As transformers does: the range of float16 is too small for what this layer adds up.
    return torch.float32 if dtype is torch.float16 and name.endswith(_WIDE) else dtype


def encoder_bytes(model_dir: str | Path, *, dtype: torch.dtype) -> int:
    """Memory that the weights of a text encoder take; nothing but its config is read.

    Raises:
        UserError: as in `find_t5`, or transformers cannot build it.
    """
    weights = _build_encoder(find_t5(model_dir)).named_parameters()
    return sum(weight.numel() * _dtype_of(name, dtype).itemsize for name, weight in weights)


def check_t5_weights(files: T5Files) -> None:
    """Compare the weights of a text encoder with its config.json; nothing but names is read.

    Raises:
        UserError: some are absent, or transformers cannot build such an encoder.
    """
    _fitting_weights(files, _build_encoder(files))


def _fitting_weights(files: T5Files, encoder: nn.Module) -> dict[str, Tensor]:
    """The weights that an `encoder` without values wants, mapped from disk."""
    wanted = encoder.state_dict()
    found: dict[str, Tensor] = {}
    for path in files.weights:
        found |= tensors_of(read_checkpoint(path), path, wrapper="module")
    _complete_table(found)
    found = {name: tensor for name, tensor in found.items() if name in wanted}  # no decoder
    unfit = differences(found, wanted)
    gaps = [*unfit["missing"], *unfit["of another shape"], *unfit["of whole numbers"]]
    if gaps:
        raise UserError(
            f"the T5 folder {files.folder} lacks {len(gaps)} of the weights that its config.json "
            f"asks for, or has them in another shape or type ({first_of(gaps)}); {_AGAIN}"
        )
    return found


def load_encoder(
    files: T5Files, *, dtype: torch.dtype, device: str | torch.device, streamed: bool
) -> nn.Module:
    """The encoder with its weights, each mapped from disk and put straight into type and place.

    With `from_pretrained` of transformers all of them would be in the host's memory first. Where
    they are `streamed` they stay mapped and in the files' type, so that the host holds no copy of
    them either; each is put into type and place on its way, every time.

    Raises:
        UserError: transformers cannot build it, or some of its weights are not in the folder.
    """
    encoder = _build_encoder(files)
    found = _fitting_weights(files, encoder)
    if not streamed:
        for name in found:
            found[name] = found[name].to(device=device, dtype=_dtype_of(name, dtype))
    encoder.load_state_dict(found, assign=True)
    encoder.set_input_embeddings(encoder.shared)  # one table under both of its names
    if streamed:
        stack = encoder.encoder
        parts = [stack.embed_tokens, *stack.block, stack.final_layer_norm]
        stream_weights(parts, device, dtype_of=partial(_dtype_of, dtype=dtype))
    return encoder.eval()  # without dropout


def _complete_table(state: dict[str, Tensor]) -> None:
    """Give the table of words both of its names; files have it under either or both."""
    for name, other in (_TABLE_NAMES, _TABLE_NAMES[::-1]):
        if name in state:
            state[other] = state[name]
