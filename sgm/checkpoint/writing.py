"""Writing weights: new folders that appear whole, safetensors in shards, SAT's layout.

Tensors are asked for one after another, so that weights larger than the memory can pass through.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.table import LazyTensors, on_meta
from sgm.checkpoint.transformer import MODEL_FILES, MODEL_PREFIX
from sgm.errors import UserError
from sgm.inference.progress import Progress

DIFFUSERS_STEM = "diffusion_pytorch_model"  # of the names of its weight files
DEFAULT_TAG = "1000"  # the published SAT weights'
DEFAULT_SHARD_BYTES = 5 * 10**9

_LOW_DISK_BYTES = 1 << 20
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


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write into; renamed to `path` at the end.

    After any failure nothing of it is left.

    Args:
        path: what is to be made; folders above it are made too.

    Raises:
        UserError: `path` exists, or writing failed with an OSError; says why.
    """
    path = Path(os.path.expanduser(path))
    refuse_existing(path)
    target = Path(os.path.abspath(path))  # "." and ".." have no name to put beside
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    made = _absent_parents(target)
    finished = False
    try:
        hidden.mkdir(parents=True)
        yield hidden
        os.rename(hidden, target)
        finished = True
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if not finished:
            shutil.rmtree(hidden, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # it was not made, or is in use by now
                    folder.rmdir()


def refuse_existing(path: Path) -> None:
    """Nothing that exists is written over.

    Raises:
        UserError: there is something at `path`, or it cannot be looked up.
    """
    try:
        exists = path.exists() or path.is_symlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be looked up ({error.strerror}); choose another output"
        ) from None
    if exists:
        raise UserError(f"{path} exists already and is left alone; remove it or name another")


def write_error(path: Path, error: OSError) -> UserError:
    """The sentence for a failure to write `path`; to be made before what was written is removed."""
    reason = error.strerror or "writing it failed"
    folder = path if path.exists() else path.parent
    with suppress(OSError):  # raised where the folder itself is gone
        if shutil.disk_usage(folder).free < _LOW_DISK_BYTES:
            reason = "no space left on device"
    return UserError(
        f"{path} cannot be written: {reason}; free some space or choose another folder"
    )


def _absent_parents(path: Path) -> list[Path]:
    """Folders above `path` that do not exist, the deepest first."""
    absent = []
    for folder in path.parents:
        if folder.exists():
            break
        absent.append(folder)
    return absent


def in_dtype(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, where: str | Path
) -> Mapping[str, Tensor]:
    """The tensors in another precision, rounded when asked for; None leaves each its own.

    Raises:
        UserError: when a tensor is asked for that has values beyond the range of `dtype`.
    """
    if dtype is None:
        return tensors

    def rounded(name: str) -> Tensor:
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.dtype is dtype:
            return tensor
        result = tensor.to(dtype)
        if not result.isfinite().all() and tensor.isfinite().all():
            raise UserError(
                f"{where}: {name} holds values beyond the range of {str(dtype)[6:]}; take bfloat16 "
                "or leave the precision as it is"
            )
        return result

    def metas() -> Mapping[str, Tensor]:
        known = on_meta(tensors).items()
        return {name: meta.to(dtype) if meta.is_floating_point() else meta for name, meta in known}

    return LazyTensors({name: partial(rounded, name) for name in tensors}, meta=metas)


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
        folder: where to; it exists. To be within `new_folder`, since shards appear one by one.
        tensors: name → tensor, of any layout in memory.
        max_shard_bytes: no file holds more than this, unless it holds a single tensor.

    Raises:
        OSError: a file cannot be written.
        UserError: safetensors has no name for a tensor's type.
    """
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
            _write_shard(folder / f"{stem}{part}.safetensors", tensors, metas, progress)
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
        folder: is made if it is not there; to be within `new_folder`.
        base: tensors of the transformer (or of a LoRA) without ``model.diffusion_model.``.
        tag: name of the inner folder.
        lora: the record of a LoRA whose matrices `base` holds, as plain values.

    Raises:
        OSError: the file cannot be written.
    """
    state: dict[str, Any] = {"module": {}}
    with Progress(len(base), unit="tensor") as progress:
        for name in base:
            state["module"][MODEL_PREFIX + name] = own_storage(base[name])
            progress.step("reading")
    if lora is not None:
        state["lora"] = dict(lora)
    (folder / tag).mkdir(parents=True)
    write_torch(state, folder / tag / MODEL_FILES[0])
    (folder / "latest").write_text(tag, encoding="utf-8")


def write_torch(state: Mapping[str, Any], path: Path) -> None:
    """torch.save that tells a full disk as an OSError; to be within `new_folder`."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError("torch.save failed") from error


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, copied where it is a part of something larger, all of which torch.save writes."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
