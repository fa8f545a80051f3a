"""Reading a weight file from a stranger: nothing in it is run, and it is mapped, not copied."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgm.checkpoint.tensors import LazyTensors
from sgm.checkpoint.weight_file import Contents, OpenFile, open_file
from sgm.errors import UserError

# Python objects that training writes beside the tensors. None of them is needed here, so each is
# replaced by an inert stand-in while the file is read; any other object means a refusal.
HARMLESS_GLOBALS = (
    "_codecs.encode",
    "argparse.Namespace",
    # Types and plain values of Python; never "builtins." as a whole, which holds eval and exec.
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.set",
    "builtins.slice",
    "builtins.str",
    "collections.defaultdict",
    "collections.deque",
    "datetime.",
    "deepspeed.",
    "numpy.",
    "omegaconf.",
    "pathlib.",
    "random.Random",
    "sat.",
    "torch.cuda.",
    "torch.optim.",
    "typing.",
)


# Under which key files of SAT format keep their tensors: transformers, and autoencoders.
_WRAPPERS = ("module", "state_dict")
_MARK_BYTES = 9  # of a file, which show how it is written
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class _Inert:
    """Takes the place of an object in a checkpoint: accepts any construction and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty_dict(*_: object) -> dict[Any, Any]:
    return {}


def _empty_list(*_: object) -> list[Any]:
    return []


# PyTorch fills items into nothing but its own few containers, subclasses excluded.
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": _empty_dict,
    "collections.deque": _empty_list,
}


def _is_harmless(name: str) -> bool:
    return any(
        name == known or (known[-1] == "." and name.startswith(known)) for known in HARMLESS_GLOBALS
    )


def _format_of(path: Path, head: bytes) -> Literal["zip", "safetensors", "pickle"]:
    """How a weight file is written; its content decides before its name does."""
    if head[:2] == b"PK":
        return "zip"
    return "safetensors" if head[8:9] == b"{" or path.suffix == ".safetensors" else "pickle"


@contextmanager
def whole_safetensors(path: Path) -> Iterator[None]:
    """Around reading a safetensors file: UserError where it is damaged or cut off."""
    try:
        yield
    except (
        *(SafetensorError, OSError, struct.error),
        *(RuntimeError, TypeError, ValueError, KeyError),  # of sizes that no tensor can have
    ) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); download or copy it again"
        ) from None


def _read_safetensors(file: BinaryIO, path: Path) -> Contents:
    with whole_safetensors(path), safe_open(_place(file), framework="pt") as read:
        tensors = {name: read.get_tensor(name) for name in read.keys()}  # noqa: SIM118
        return Contents(tensors, read.metadata() or {}, OpenFile(file))


def _place(file: BinaryIO) -> str:
    """A path of an open file, since the one it was opened by may be another's meanwhile."""
    return f"/proc/self/fd/{file.fileno()}"


def _read_bytes(file: OpenFile, start: int, size: int, *, path: Path) -> Tensor:
    """`size` bytes from `start` on, in memory of their own.

    Raises:
        UserError: the file has become shorter.
    """
    data = torch.empty(size, dtype=torch.uint8, device="cpu")
    rest, position = memoryview(data.numpy()), start
    while rest:
        with whole_safetensors(path):
            count = os.preadv(file.descriptor, [rest], position)
        if not count:
            raise UserError(f"{path} is cut off; download or copy it again")
        rest, position = rest[count:], position + count
    return data


def _open_safetensors(file: BinaryIO, path: Path) -> Contents:
    """As `_read_safetensors`, with tensors that are read from the kept file when asked for."""
    with whole_safetensors(path), safe_open(_place(file), framework="np") as checked:
        names, metadata = checked.keys(), checked.metadata() or {}
    kept = OpenFile(file)
    read = partial(_read_bytes, kept, path=path)
    length = int.from_bytes(read(0, 8).numpy().tobytes(), "little")
    header = json.loads(read(8, length).numpy().tobytes())
    makers, shapes = {}, {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {entry['dtype']}; quantised weights are not read, "
                "take the original ones (float32, float16 or bfloat16)"
            )
        dtype, (start, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        with whole_safetensors(path):
            shapes[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
        makers[name] = partial(_read_tensor, read, 8 + length + start, end - start, shapes[name])
    if not shapes:
        raise UserError(f"{path} holds no tensors; copy it from the original again")
    return Contents(LazyTensors(makers, meta=lambda: shapes), metadata, kept)


def _read_tensor(read: Callable[[int, int], Tensor], start: int, size: int, like: Tensor) -> Tensor:
    return read(start, size).view(like.dtype).reshape(like.shape)


def _check_zip(file: BinaryIO, path: Path) -> None:
    """Tell a truncated file and a zip of something else from one that torch.save wrote."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, struct.error):
        raise UserError(
            f"{path} is not a whole file (its end is missing or damaged); download or copy it again"
        ) from None
    if not any(name.endswith("/data.pkl") for name in names):
        few = ", ".join(names[:3]) or "nothing"
        raise UserError(
            f"{path} is a zip archive of something else (it holds {few}), not weights; "
            "if the weights are inside, unpack it first"
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"{path} cannot be read as weights ({reason[0]}); download or copy it again")


def _read_torch(file: BinaryIO, path: Path, *, is_zip: bool) -> Any:
    inert: list[tuple[Callable[..., Any], str]] = []
    if is_zip:
        _check_zip(file, path)
        try:
            file.seek(0)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception as error:  # as below
            raise _unreadable(path, error) from None
        unknown = [name for name in names if not _is_harmless(name)]
        if unknown:
            raise UserError(
                f"{path} carries pickled code ({unknown[0]}) that weights have no need of, so it "
                "was not loaded; ask its author for a .safetensors file"
            )
        inert = [(_CONTAINERS.get(name) or type("Inert", (_Inert,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals(inert), warnings.catch_warnings():
            # Files of other pickle protocols either load or are refused below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # By this name, as PyTorch takes what is called .safetensors for that.
            return torch.load(_place(file), map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a weight file of PyTorch, or carries pickled code; it was not loaded"
        ) from None
    except Exception as error:  # a damaged pickle can make the reader raise anything
        raise _unreadable(path, error) from None


def read_weights(path: Path, *, lazily: bool = False) -> Contents:
    """What a ``.safetensors`` or ``torch.save`` file holds; every weight file is read by this.

    The content decides, not the file's name. Tensors are mapped from disk, so they take memory
    only as they are used. No code from the file is run: of Python objects beside the tensors only
    stand-ins come back.

    Args:
        path: the file.
        lazily: read each tensor of a safetensors file into memory of its own when it is asked
            for, so that what was read before takes no memory.

    Returns:
        As state a mapping of tensors for safetensors; for torch.save whatever was saved.

    Raises:
        UserError: the file is missing, empty, truncated, something else, or carries code.
    """
    # A configuration may be read while PyTorch builds its parts on the device "meta".
    with open_file(path) as file, torch.device("cpu"):
        kind = _format_of(path, file.read(_MARK_BYTES))
        if kind == "safetensors":
            return _open_safetensors(file, path) if lazily else _read_safetensors(file, path)
        return Contents(_read_torch(file, path, is_zip=kind == "zip"), {}, OpenFile(file))


def read_checkpoint(path: str | Path) -> Any:
    """The state of `read_weights`, with the same errors."""
    return read_weights(Path(path)).state


def _is_plain(tensor: Tensor) -> bool:
    is_dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
    return is_dense and not (tensor.is_meta or tensor.is_complex())


def tensors_of(state: Any, path: Path, *, wrapper: str) -> Mapping[str, Tensor]:
    """The name → tensor mapping in a file's `state`, under the key `wrapper` if it is there.

    The keys of other kinds are looked under too, so that the names can tell what the file is.

    Raises:
        UserError: there is no such dict, or a tensor in it is not dense and real.
    """
    if isinstance(state, LazyTensors):  # whose header has said what its tensors are
        return state
    if isinstance(state, dict):
        wrapped = (state.get(key) for key in (wrapper, *_WRAPPERS))
        state = next((inner for inner in wrapped if isinstance(inner, dict)), state)
    if isinstance(state, dict):
        tensors = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
        for name, tensor in tensors.items():
            if not _is_plain(tensor):
                raise UserError(
                    f"{path}: {name!r} is not a dense tensor of real numbers, as weights are; "
                    "download or copy it again"
                )
            # Of any size in a file of a few bytes, it would fill the memory.
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise UserError(
                    f"{path}: {name!r} is a tensor of {list(tensor.shape)} of which the file holds "
                    "a part, repeated; ask its author to save it with .contiguous()"
                )
        if tensors:
            return tensors
    raise UserError(
        f"{path} holds no tensors under {wrapper!r}; is it a checkpoint of the right kind?"
    )
