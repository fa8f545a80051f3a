"""Reading a weight file from a stranger: nothing in it is run, and it is mapped, not copied."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

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


def check_kind(path: Path) -> None:
    """Refuse what is recognisably not the file that should be there.

    Raises:
        UserError: the file is absent, not readable, empty, an HTML page or a pointer of git-lfs.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path in the configuration")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from None
    start = head.lstrip().lower()
    if not head:
        raise UserError(f"{path} is empty; download or copy it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(
            f"{path} is a web page, not the file itself: the download link answered with HTML; "
            "download it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a pointer of git-lfs, not the file itself; run 'git lfs pull' there"
        )


def _format_of(path: Path) -> Literal["zip", "safetensors", "pickle"]:
    """How a weight file is written; its content decides before its name does."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[:2] == b"PK":
        return "zip"
    return "safetensors" if head[8:9] == b"{" or path.suffix == ".safetensors" else "pickle"


def check_weight_file(path: Path) -> None:
    """Refuse a file that is not weights or not whole, without reading its tensors.

    Raises:
        UserError: as in `check_kind`; or the file is cut off, or an archive of something else.
    """
    check_kind(path)
    kind = _format_of(path)
    if kind == "zip":
        _check_zip(path)
    elif kind == "safetensors":
        with whole_safetensors(path), safe_open(path, framework="pt"):
            pass


@contextmanager
def whole_safetensors(path: Path) -> Iterator[None]:
    """Around reading a safetensors file: UserError where it is damaged or cut off."""
    try:
        yield
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); download or copy it again"
        ) from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with whole_safetensors(path):
        return load_file(path)


def _check_zip(path: Path) -> None:
    """Tell a truncated file and a zip of something else from one that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
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


def _read_torch(path: Path, *, is_zip: bool) -> Any:
    inert: list[tuple[Callable[..., Any], str]] = []
    if is_zip:
        _check_zip(path)
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
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
        with (
            torch.serialization.safe_globals(inert),
            warnings.catch_warnings(),
            path.open("rb") as file,
        ):
            # Files of other pickle protocols either load or are refused below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # By this name, as PyTorch takes what is called .safetensors for that.
            name = f"/proc/self/fd/{file.fileno()}"
            return torch.load(name, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a weight file of PyTorch, or carries pickled code; it was not loaded"
        ) from None
    except Exception as error:  # a damaged pickle can make the reader raise anything
        raise _unreadable(path, error) from None


def read_checkpoint(path: str | Path) -> Any:
    """What a ``.safetensors`` or ``torch.save`` file holds, its tensors mapped from disk on CPU.

    The content decides, not the file's name. Tensors take memory only as they are read, and no
    code from the file is run: of Python objects beside the tensors only stand-ins come back.

    Returns:
        A dict of tensors for safetensors; for torch.save whatever was saved.

    Raises:
        UserError: the file is absent, empty, truncated, something else, or carries code.
    """
    path = Path(path)
    check_kind(path)
    kind = _format_of(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return _read_torch(path, is_zip=kind == "zip")


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
    return is_dense and not (tensor.is_meta or tensor.is_complex())


def tensors_of(state: Any, path: Path, *, wrapper: str) -> dict[str, torch.Tensor]:
    """The name → tensor dict in what `read_checkpoint` returned, under the key `wrapper` if there.

    Under the other kind's key too, so that whoever sorts the names can tell what the file is.

    Raises:
        UserError: there is no such dict, or a tensor in it is not dense and real.
    """
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
