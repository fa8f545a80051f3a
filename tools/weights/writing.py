"""Writing weights: safetensors in shards, SAT's layout, and T5 folders, which are copied.

Tensors are asked for one after another, so that weights larger than the memory can pass through.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.find import MODEL_FILES, SHARD, TOKENIZER_FILES, VARIANT, T5Files, shard_indices
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.transformer import MODEL_PREFIX
from sgm.errors import UserError
from sgm.files import write_torch
from sgm.progress import Progress

logger = logging.getLogger(__name__)


DIFFUSERS_STEM = "diffusion_pytorch_model"  # of the names of its weight files
DEFAULT_TAG = "1000"  # the published SAT weights'
DEFAULT_SHARD_BYTES = 5 * 10**9

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Watched(Mapping[str, Tensor]):
    """Tensors that are written, each asked for once, of which damaged ones are told in the end."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._damaged: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        # float8 has no test for it, and whole numbers need none.
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
            self._damaged.append(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tell(self) -> None:
        """Warn of tensors with values that are not finite."""
        if self._damaged:
            logger.warning(
                "%d of %d tensors hold values that are not finite (%s first), and are written as "
                "they are; no video can be made with them",
                *(len(self._damaged), len(self._tensors), self._damaged[0]),
            )


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    stem: str = DIFFUSERS_STEM,
) -> None:
    """Write ``{stem}.safetensors``, or several shards of it and an index, as diffusers does.

    One tensor is in memory at a time.

    Args:
        folder: where to; it exists. To be within `sgm.files.new_folder`, since shards appear one
            by one.
        tensors: name → tensor, of any layout in memory.
        max_shard_bytes: no file holds more than this, unless it holds a single tensor.

    Raises:
        OSError: a file cannot be written.
        UserError: safetensors has no name for a tensor's type.
    """
    watched = _Watched(tensors)
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, meta in on_meta(tensors).items():
        if not shards or meta.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = meta
        room -= meta.nbytes
    files = {}
    with Progress(len(tensors), unit="tensor") as progress:
        for i, metas in enumerate(shards, start=1):
            part = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            files[f"{stem}{part}.safetensors"] = metas
            _write_shard(folder / f"{stem}{part}.safetensors", watched, metas, progress)
    watched.tell()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(m.nbytes for metas in shards for m in metas.values())},
            "weight_map": {name: file for file, metas in files.items() for name in metas},
        }
        save_json(folder / f"{stem}.safetensors.index.json", index)


def _write_shard(
    path: Path, tensors: Mapping[str, Tensor], metas: Mapping[str, Tensor], progress: Progress
) -> None:
    """One safetensors file: size of the header, header, then the tensors without gaps.

    Format: https://huggingface.co/docs/safetensors, "Format". The package itself writes only what
    is in memory as a whole.
    """
    # The largest elements first, so that every tensor begins at a multiple of its element's size.
    names = sorted(metas, key=lambda name: -metas[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        meta = metas[name]
        if meta.dtype not in _DTYPES:
            raise UserError(f"{name} is of the type {meta.dtype}, which weights are not saved in")
        begin, end = end, end + meta.nbytes
        header[name] = {
            "dtype": _DTYPES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(_bytes_of(tensors[name]))
            progress.step(path.name)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


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
    """``{folder}/latest`` and ``{folder}/{tag}/mp_rank_00_model_states.pt``, as published.

    Args:
        folder: is made if it is not there; to be within `sgm.files.new_folder`.
        base: tensors of the transformer (or of a LoRA) without ``model.diffusion_model.``.
        tag: name of the inner folder.
        lora: the record of a LoRA whose matrices `base` holds, as plain values.

    Raises:
        OSError: the file cannot be written.
    """
    watched = _Watched(base)
    state: dict[str, Any] = {"module": {}}
    with Progress(len(base), unit="tensor") as progress:
        for name in base:
            state["module"][MODEL_PREFIX + name] = own_storage(watched[name])
            progress.step("reading")
    watched.tell()
    if lora is not None:
        state["lora"] = dict(lora)
    (folder / tag).mkdir(parents=True)
    write_torch(state, folder / tag / MODEL_FILES[0])
    (folder / "latest").write_text(tag, encoding="utf-8")


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, copied where it is a part of something larger, all of which torch.save writes."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


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
    sources = [files.folder / "config.json", *shard_indices(files), *files.weights]
    with Progress(len(sources), unit="file") as progress:
        for source in sources:
            # Shards keep the names that the index has for them.
            is_shard = SHARD in source.name
            name = source.name if is_shard else source.name.replace(VARIANT, "")
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
