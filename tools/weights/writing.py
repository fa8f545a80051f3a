"""Write weights: safetensors in shards, SAT's layout, and copies of T5 folders."""

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


DIFFUSERS_STEM = "diffusion_pytorch_model"  # how diffusers' weight files begin
DEFAULT_TAG = "1000"  # the tag of the published SAT weights
DEFAULT_SHARD_BYTES = 2 * 10**9
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    stem: str = DIFFUSERS_STEM,
) -> None:
    """Write ``{stem}.safetensors``, or shards and an index, as diffusers does.

    Only the tensors of one shard are in memory at a time.

    Args:
        folder: an existing folder. It should be one that `sgm.files.new_folder` has yielded,
            because shards are written one by one.
        tensors: name → tensor, in any memory layout.
        max_shard_bytes: the most bytes per file. A larger tensor gets a file of its own.
        stem: the beginning of the file names.

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
        tensors: name → tensor. Each tensor is contiguous and shares no storage with another.
        path: the file. It should be in a folder that `sgm.files.new_folder` has yielded, or a path
            that `sgm.files.replacing` has yielded.
        metadata: more metadata for the header.

    Raises:
        OSError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # raised on a full disk
        raise OSError(f"safetensors: {error}") from error
    path.chmod(mode)  # save_file makes the file readable for the owner only


def _read(
    tensors: Mapping[str, Tensor], names: Iterable[str], progress: Progress
) -> dict[str, Tensor]:
    """Return the tensors of `names`, ready to save; warn about values that are not finite."""
    found, damaged = {}, []
    for name in names:
        found[name] = tensor = own_storage(tensors[name])
        # isfinite is not implemented for float8.
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
            damaged.append(name)
        progress.step("writing")
    if damaged:
        logger.warning(
            "%d of %d tensors contain values that are not finite (the first is %s); they are "
            "written unchanged, but no video can be made with them",
            *(len(damaged), len(found), damaged[0]),
        )
    return found


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` in the style of diffusers' configurations: indented, with sorted keys."""
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
        folder: created if it does not exist. Use a folder that `sgm.files.new_folder` has yielded,
            or a folder inside it.
        base: the tensors of the transformer or a LoRA. The prefix ``model.diffusion_model.`` is
            added to their names.
        tag: the name of the inner folder.
        lora: the record of the LoRA, as plain values, if `base` contains LoRA matrices.

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
    """Return `tensor` as contiguous, and as a copy if it is part of a larger storage.

    torch.save would write the whole storage, and safetensors rejects tensors that share a storage.
    """
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def copy_text_encoder(files: T5Files, folder: Path, *, link: bool) -> None:
    """Copy ``config.json`` and the weights of a T5 folder into a new folder.

    Args:
        files: the T5 files, as returned by `find_t5`.
        folder: created. It should be in a folder that `sgm.files.new_folder` has yielded.
        link: create symbolic links instead of copies.

    Raises:
        OSError: a file cannot be written.
    """
    logger.info("%s text_encoder", "linking" if link else "copying")
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*files.indices, *(source for source in files.sources if source != files.tokenizer)]
    with Progress(len(sources), unit="file") as progress:
        for source in sources:
            # Shards keep their names because the index contains these names.
            name = source.name if SHARD in source.name else source.name.replace(VARIANT, "")
            if link:
                os.symlink(os.path.realpath(source), folder / name)
            else:
                shutil.copyfile(source, folder / name)
            progress.step(name)


def copy_tokenizer_files(files: T5Files, folder: Path) -> None:
    """Copy the tokenizer of a T5 folder, and its companion JSON files, to `folder`.

    Raises:
        OSError: a file cannot be written.
    """
    for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        source = files.tokenizer.with_name(name)
        if source.is_file():
            shutil.copyfile(source, folder / name)
