"""Writing weights: safetensors in shards, SAT's layout, and T5 folders, which are copied."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sgm.checkpoint.find import MODEL_FILES, SHARD, TOKENIZER_FILES, VARIANT, T5Files
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.transformer import MODEL_PREFIX
from sgm.files import write_torch
from sgm.progress import Progress

logger = logging.getLogger(__name__)


DIFFUSERS_STEM = "diffusion_pytorch_model"  # of the names of diffusers' weight files
DEFAULT_TAG = "1000"  # of the published SAT weights
DEFAULT_SHARD_BYTES = 2 * 10**9
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    stem: str = DIFFUSERS_STEM,
) -> None:
    """Write ``{stem}.safetensors``, or several shards of it and an index, as diffusers does.

    The tensors of one shard are in memory at a time.

    Args:
        folder: exists; to be within `sgm.files.new_folder`, since shards appear one by one.
        tensors: name → tensor, of any layout in memory.
        max_shard_bytes: no file holds more than this, unless it holds a single tensor.
        stem: beginning of the names of the files.

    Raises:
        OSError: a file cannot be written.
    """
    plan = split_torch_state_dict_into_shards(
        {name: own_storage(meta) for name, meta in on_meta(tensors).items()},
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    with Progress(len(tensors), unit="tensor") as progress:
        for file, names in plan.filename_to_tensors.items():
            save_safetensors(_read(tensors, names, progress), folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        save_json(folder / f"{stem}.safetensors.index.json", index)


def save_safetensors(
    tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        tensors: name → tensor, each contiguous and in memory of its own.
        path: of the file; to be within `sgm.files.new_folder` or `sgm.files.replacing`.
        metadata: added to the header.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # what it raises on a full disk
        raise OSError(f"safetensors: {error}") from error
    path.chmod(mode)  # save_file lets only the owner read the file


def _read(
    tensors: Mapping[str, Tensor], names: Iterable[str], progress: Progress
) -> dict[str, Tensor]:
    """Some of the tensors, to be saved. Values that are not finite give a warning."""
    found, damaged = {}, []
    for name in names:
        found[name] = tensor = own_storage(tensors[name])
        # isfinite is not implemented for float8.
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
            damaged.append(name)
        progress.step("writing")
    if damaged:
        logger.warning(
            "%d of %d tensors hold values that are not finite (%s first), and are written as they "
            "are; no video can be made with them",
            *(len(damaged), len(found), damaged[0]),
        )
    return found


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as diffusers writes its configurations: indented, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_sat_transformer(
    folder: Path,
    base: Mapping[str, Tensor],
    *,
    tag: str = DEFAULT_TAG,
    lora: Mapping[str, Any] | None = None,
) -> None:
    """Write ``{folder}/latest`` and ``{folder}/{tag}/mp_rank_00_model_states.pt``, as published.

    Args:
        folder: is created if it does not exist; to be within `sgm.files.new_folder`.
        base: tensors of the transformer (or of a LoRA) without ``model.diffusion_model.``.
        tag: name of the inner folder.
        lora: the record of a LoRA whose matrices `base` holds, as plain values.

    Raises:
        OSError: the file cannot be written.
    """
    with Progress(len(base), unit="tensor") as progress:
        found = _read(base, base, progress)
    state: dict[str, Any] = {"module": {MODEL_PREFIX + name: found[name] for name in found}}
    if lora is not None:
        state["lora"] = dict(lora)
    (folder / tag).mkdir(parents=True)
    write_torch(state, folder / tag / MODEL_FILES[0])
    (folder / "latest").write_text(tag, encoding="utf-8")


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous, and copied if it is part of a larger storage.

    torch.save would write the whole storage, and safetensors refuses tensors that share one.
    """
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def copy_text_encoder(files: T5Files, folder: Path, *, link: bool) -> None:
    """Copy ``config.json`` and the weights of a T5 folder into a new folder.

    Args:
        files: as `find_t5` returns them.
        folder: is created; to be within `sgm.files.new_folder`.
        link: create symbolic links instead of copies.

    Raises:
        OSError: a file cannot be written.
    """
    logger.info("%s text_encoder", "linking" if link else "copying")
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*files.indices, *(source for source in files.sources if source != files.tokenizer)]
    with Progress(len(sources), unit="file") as progress:
        for source in sources:
            # Shards keep the names that the index gives them.
            name = source.name if SHARD in source.name else source.name.replace(VARIANT, "")
            if link:
                os.symlink(os.path.realpath(source), folder / name)
            else:
                shutil.copyfile(source, folder / name)
            progress.step(name)


def copy_tokenizer_files(files: T5Files, folder: Path) -> None:
    """Copy a T5 folder's tokenizer, and what libraries keep beside it, into the folder `folder`.

    Raises:
        OSError: a file cannot be written.
    """
    for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        source = files.tokenizer.with_name(name)
        if source.is_file():
            shutil.copyfile(source, folder / name)
