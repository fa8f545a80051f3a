"""Reads weight files safely: no code in a file is run, and tensors are mapped, not copied."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgm.checkpoint.tensors import LazyTensors
from sgm.checkpoint.weight_file import Contents, OpenFile, damaged, open_file
from sgm.errors import UserError, first_of

# Python objects that training saves next to the tensors. They are not needed here, so each is
# replaced by an inert stand-in while the file is read. A file with any other object is refused.
HARMLESS_GLOBALS = (
    "_codecs.encode",
    "argparse.Namespace",
    # Types and plain values; never all of "builtins.", because it contains eval and exec.
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


# Files in SAT format keep a transformer's tensors under the first key, an autoencoder's under the
# second.
_WRAPPERS = ("module", "state_dict")
_MARK_BYTES = 9  # read from the start of a file to recognize its format
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # not quantized


class _Inert:
    """A stand-in for an object in a checkpoint: it accepts any arguments and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Stand-ins for containers: PyTorch's unpickler adds items only to exact dicts, lists and the like.
_CONTAINERS: dict[str, Callable[..., object]] = {
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda *_: [],
}


def _is_harmless(name: str) -> bool:
    return any(
        name == known or (known[-1] == "." and name.startswith(known)) for known in HARMLESS_GLOBALS
    )


def _format_of(path: Path, head: bytes) -> Literal["zip", "safetensors", "pickle"]:
    """Return the format of a weight file: by its content or, if that is unclear, by its name."""
    if head[:2] == b"PK":
        return "zip"
    return "safetensors" if head[8:9] == b"{" or path.suffix == ".safetensors" else "pickle"


@contextmanager
def _whole_safetensors(path: Path) -> Iterator[None]:
    """Turn errors of reading a damaged or truncated safetensors file into UserError."""
    try:
        yield
    except (
        *(SafetensorError, OSError, struct.error),
        *(RuntimeError, TypeError, ValueError, KeyError),  # raised for impossible sizes
    ) as error:
        raise damaged(path, f"is not a whole safetensors file ({error})") from None


def _place(file: BinaryIO) -> str:
    """Return a path to an open file, valid even if another file now has its original path."""
    return f"/proc/self/fd/{file.fileno()}"


def _read_safetensors(file: BinaryIO, path: Path, *, lazily: bool) -> Contents:
    """Return the contents of a safetensors file. Arguments and errors are as in `read_weights`."""
    with _whole_safetensors(path), safe_open(_place(file), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        in_file_order, metadata = opened.offset_keys(), opened.metadata() or {}
    kept = OpenFile(file)
    if not lazily:
        return Contents(tensors, metadata, kept)
    # The tensors fill the file after the header without gaps; safetensors has checked this.
    position = os.fstat(kept.descriptor).st_size - sum(t.nbytes for t in tensors.values())
    positions = {}
    for name in in_file_order:
        positions[name], position = position, position + tensors[name].nbytes
    makers, shapes = {}, {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {str(tensor.dtype)[6:]}; quantized weights are not "
                "supported, use the original weights (float32, float16 or bfloat16)"
            )
        shapes[name] = tensor.to("meta")
        makers[name] = partial(_read_tensor, kept, positions[name], shapes[name], path)
    if not shapes:
        raise damaged(path, "holds no tensors")
    return Contents(LazyTensors(makers, meta=shapes), metadata, kept)


def _read_tensor(file: OpenFile, start: int, like: Tensor, path: Path) -> Tensor:
    """Read a tensor into its own memory.

    Args:
        file: the open file.
        start: the position of the tensor in the file, in bytes.
        like: a meta tensor with the shape and dtype of the tensor.
        path: the file, for messages.

    Raises:
        UserError: the file has become shorter.
    """
    data = torch.empty(like.nbytes, dtype=torch.uint8, device="cpu")
    rest, position = data.numpy().data, start
    while rest:
        with _whole_safetensors(path):
            count = os.preadv(file.descriptor, [rest], position)
        if not count:
            raise damaged(path, "is cut off")
        rest, position = rest[count:], position + count
    return data.view(like.dtype).reshape(like.shape)


def _check_zip(file: BinaryIO, path: Path) -> None:
    """Raise UserError if a zip file is truncated or was not written by torch.save."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, struct.error):
        raise damaged(path, "is not a whole file (its end is missing or damaged)") from None
    if not any(name.endswith("/data.pkl") for name in names):
        raise UserError(
            f"{path} is a zip archive of something else (it holds {first_of(names) or 'nothing'}), "
            "not weights; if the weights are inside, unpack it first"
        )


def _stand_ins(file: BinaryIO, path: Path) -> list[tuple[Callable[..., object], str]]:
    """Return (stand-in, name) of each non-tensor object in a zip file of torch.save.

    Raises:
        UserError: the file is truncated, not from torch.save, or contains unknown objects.
    """
    _check_zip(file, path)
    file.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    unknown = [name for name in names if not _is_harmless(name)]
    if unknown:
        raise UserError(
            f"{path} carries pickled code ({unknown[0]}) and was not loaded, because weights need "
            "no code; ask the author for a .safetensors file"
        )
    return [(_CONTAINERS.get(name) or type("Inert", (_Inert,), {}), name) for name in names]


def _read_torch(file: BinaryIO, path: Path, *, is_zip: bool) -> object:
    """Return the object in a file of torch.save, without running code from the file."""
    try:
        inert = _stand_ins(file, path) if is_zip else []
        with torch.serialization.safe_globals([*inert]), warnings.catch_warnings():
            # Files with other pickle protocols either load or raise an error that is caught below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Not the file's own path, because PyTorch treats a file as safetensors by its name.
            return torch.load(_place(file), map_location="cpu", mmap=is_zip, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} was not loaded: it is not a weight file of PyTorch, or carries pickled code"
        ) from None
    except Exception as error:  # a damaged pickle can make the reader raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise damaged(path, f"cannot be read as weights ({reason[0]})") from None


def read_weights(path: Path, *, lazily: bool = False) -> Contents:
    """Read a ``.safetensors`` or ``torch.save`` file. All weight files are read by this function.

    The format is recognized by the content, not by the file's name. Tensors are mapped from disk
    and take memory only when they are used. No code from the file is run: Python objects other
    than tensors are replaced by inert stand-ins.

    Args:
        path: the file.
        lazily: read each tensor of a safetensors file into its own memory on access; this memory
            is freed with the tensor.

    Returns:
        The contents. `state` is the name → tensor mapping of a safetensors file, or the object
        that torch.save saved.

    Raises:
        UserError: the file is missing, empty, truncated, not a weight file, or contains code.
    """
    # The device is set because the caller may be building a model on the device "meta".
    with open_file(path) as file, torch.device("cpu"):
        kind = _format_of(path, file.read(_MARK_BYTES))
        if kind == "safetensors":
            return _read_safetensors(file, path, lazily=lazily)
        return Contents(_read_torch(file, path, is_zip=kind == "zip"), {}, OpenFile(file))


def read_checkpoint(path: str | Path) -> object:
    """Return only the `state` that `read_weights` reads. Errors are as in `read_weights`."""
    return read_weights(Path(path)).state


def tensors_of(state: object, path: Path) -> Mapping[str, Tensor]:
    """Return the name → tensor mapping in a file's `state`.

    In SAT format the mapping is the value of the key ``module`` or ``state_dict``.

    Raises:
        UserError: `state` contains no such mapping, or a tensor in it is not dense and real.
    """
    if isinstance(state, LazyTensors):  # checked when the header was read
        return state
    if isinstance(state, dict):
        wrapped = (state.get(key) for key in _WRAPPERS)
        state = next((inner for inner in wrapped if isinstance(inner, dict)), state)
    items = state.items() if isinstance(state, dict) else ()
    tensors = {key: t for key, t in items if isinstance(key, str) and torch.is_tensor(t)}
    if not tensors:
        raise UserError(
            f"{path} holds no tensors under 'module' or 'state_dict'; is it a checkpoint of the "
            "right kind?"
        )
    for name, tensor in tensors.items():
        is_dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
        is_real = is_dense and not tensor.is_meta and not tensor.is_complex()
        # With overlapping strides a tiny file can hold a huge tensor, which would fill the memory.
        if (
            not is_real
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise damaged(
                f"{path}: {name!r}",
                "is not a dense tensor of real numbers, or its values are not all in the file",
            )
    return tensors
