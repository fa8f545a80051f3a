"""Safe reading of weight files: no code in them is run, and tensors are mapped, not copied."""

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

# Python objects that training writes beside the tensors. None of them is needed here, so an inert
# stand-in replaces each while the file is read; a file with any other object is not read.
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


# The keys under which files of SAT format keep their tensors: transformers, and autoencoders.
_WRAPPERS = ("module", "state_dict")
_MARK_BYTES = 9  # of a file, which show its format
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # not quantised


class _Inert:
    """A stand-in for an object in a checkpoint: it accepts any construction and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# PyTorch fills items only into its own few containers, subclasses excluded.
_CONTAINERS: dict[str, Callable[..., object]] = {
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda *_: [],
}


def _is_harmless(name: str) -> bool:
    return any(
        name == known or (known[-1] == "." and name.startswith(known)) for known in HARMLESS_GLOBALS
    )


def _format_of(path: Path, head: bytes) -> Literal["zip", "safetensors", "pickle"]:
    """The format of a weight file, by its content; by its name only where that does not show it."""
    if head[:2] == b"PK":
        return "zip"
    return "safetensors" if head[8:9] == b"{" or path.suffix == ".safetensors" else "pickle"


@contextmanager
def _whole_safetensors(path: Path) -> Iterator[None]:
    """Around reading a safetensors file: UserError if it is damaged or cut off."""
    try:
        yield
    except (
        *(SafetensorError, OSError, struct.error),
        *(RuntimeError, TypeError, ValueError, KeyError),  # of sizes that no tensor can have
    ) as error:
        raise damaged(path, f"is not a whole safetensors file ({error})") from None


def _place(file: BinaryIO) -> str:
    """A path of an open file: another file may have been put at its own path by now."""
    return f"/proc/self/fd/{file.fileno()}"


def _read_safetensors(file: BinaryIO, path: Path, *, lazily: bool) -> Contents:
    """The contents of a safetensors file; arguments and errors as in `read_weights`."""
    with _whole_safetensors(path), safe_open(_place(file), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        in_file_order, metadata = opened.offset_keys(), opened.metadata() or {}
    kept = OpenFile(file)
    if not lazily:
        return Contents(tensors, metadata, kept)
    # The tensors fill the rest of the file behind the header; safetensors has checked that.
    position = os.fstat(kept.descriptor).st_size - sum(t.nbytes for t in tensors.values())
    positions = {}
    for name in in_file_order:
        positions[name], position = position, position + tensors[name].nbytes
    makers, shapes = {}, {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {str(tensor.dtype)[6:]}; quantised weights are not "
                "read, take the original ones (float32, float16 or bfloat16)"
            )
        shapes[name] = tensor.to("meta")
        makers[name] = partial(_read_tensor, kept, positions[name], shapes[name], path)
    if not shapes:
        raise damaged(path, "holds no tensors")
    return Contents(LazyTensors(makers, meta=shapes), metadata, kept)


def _read_tensor(file: OpenFile, start: int, like: Tensor, path: Path) -> Tensor:
    """The tensor that begins at `start`, in memory of its own.

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
    """Raise UserError for a truncated file and for a zip that torch.save did not write."""
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
    """The stand-in of each object that a zip of torch.save holds beside tensors, and its name."""
    _check_zip(file, path)
    file.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    unknown = [name for name in names if not _is_harmless(name)]
    if unknown:
        raise UserError(
            f"{path} carries pickled code ({unknown[0]}), which weights do not need, so it was not "
            "loaded; ask its author for a .safetensors file"
        )
    return [(_CONTAINERS.get(name) or type("Inert", (_Inert,), {}), name) for name in names]


def _read_torch(file: BinaryIO, path: Path, *, is_zip: bool) -> object:
    """The object in a file of torch.save, without running code from the file."""
    try:
        inert = _stand_ins(file, path) if is_zip else []
        with torch.serialization.safe_globals([*inert]), warnings.catch_warnings():
            # Files of other pickle protocols either load or raise below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # By this path, since PyTorch decides by the name .safetensors, not by the content.
            return torch.load(_place(file), map_location="cpu", mmap=is_zip, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a weight file of PyTorch, or carries pickled code; it was not loaded"
        ) from None
    except Exception as error:  # a damaged pickle can make the reader raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise damaged(path, f"cannot be read as weights ({reason[0]})") from None


def read_weights(path: Path, *, lazily: bool = False) -> Contents:
    """The contents of a ``.safetensors`` or ``torch.save`` file. It reads every weight file.

    The content decides about the format, not the file's name. Tensors are mapped from disk, so
    they take memory only as they are used. No code from the file is run: inert stand-ins replace
    the Python objects beside the tensors.

    Args:
        path: the file.
        lazily: read each tensor of a safetensors file into memory of its own on access, so that
            tensors that were dropped take no memory.

    Returns:
        As state a mapping of tensors for safetensors; for torch.save the object that was saved.

    Raises:
        UserError: the file is missing, empty, truncated, not a weight file, or carries code.
    """
    # A configuration may be read while PyTorch builds its parts on the device "meta".
    with open_file(path) as file, torch.device("cpu"):
        kind = _format_of(path, file.read(_MARK_BYTES))
        if kind == "safetensors":
            return _read_safetensors(file, path, lazily=lazily)
        return Contents(_read_torch(file, path, is_zip=kind == "zip"), {}, OpenFile(file))


def read_checkpoint(path: str | Path) -> object:
    """The state of `read_weights`, with the same errors."""
    return read_weights(Path(path)).state


def tensors_of(state: object, path: Path) -> Mapping[str, Tensor]:
    """The name → tensor mapping in a file's `state`, which files of SAT format keep under a key.

    Raises:
        UserError: there is no such dict, or a tensor in it is not dense and real.
    """
    if isinstance(state, LazyTensors):  # its header has shown what its tensors are
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
        # A repeated part can stand for any size in a file of a few bytes, and fill the memory.
        if (
            not is_real
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise damaged(
                f"{path}: {name!r}",
                "is not a dense tensor of real numbers that are all in the file",
            )
    return tensors
