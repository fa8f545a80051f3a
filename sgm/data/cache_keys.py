"""Keys of cache entries, which name all that an entry depends on, and the digests of files.

A name is a digest of contents, never of paths or times of files, so an entry is found again after
files were moved, and not after one was changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sgm.checkpoint.find import T5Files, Weights, find_autoencoder, find_t5
from sgm.checkpoint.weight_file import WeightFile
from sgm.errors import UserError
from sgm.files import replacing
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.util import get_class

logger = logging.getLogger(__name__)


# To be raised when other code makes another content: which frames are taken, how they are scaled,
# what the autoencoder or the text encoder compute, how an entry is written.
VERSION = 1

_CHUNK_BYTES = 1 << 20
# A file above this size is known by samples of it: T5-XXL's may have 44 GB, and would be read
# whole at every start.
WHOLE_BYTES = 1 << 30
# One sample for each stretch of this size. T5-XXL's matrices are larger, so each is met.
_STRETCH_BYTES = 8 << 20
_SAMPLE_BYTES = 1 << 12


def _digest(*parts: Any) -> str:
    """40 hexadecimal digits for values as JSON knows them."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def hash_file(path: Path) -> str:
    """The digest of a file's whole content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return _hash_all(file)


def _hash_all(file: BinaryIO) -> str:
    state = hashlib.blake2b(digest_size=20)
    while chunk := file.read(_CHUNK_BYTES):
        state.update(chunk)
    return state.hexdigest()


def hash_weights(weights: WeightFile) -> str:
    """The digest of a file of weights: of all of it, or of samples where it is above 1 GiB.

    Where the file was read already, the digest is that of the very file whose tensors are mapped.

    Samples are its size, its first and last MiB and 4 KiB of every 8 MiB. They hold the names,
    types and shapes (safetensors' head), the check sums of all tensors (in the last MiB of what
    torch.save wrote) and a part of every large tensor. So other weights, or weights that were
    trained on, have another digest; an edit of a few numbers in a safetensors file need not.

    Raises:
        OSError: it cannot be read.
    """
    with weights.open() as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            return _hash_all(file)
        state = hashlib.blake2b(str(size).encode(), digest_size=20)
        state.update(file.read(_CHUNK_BYTES))
        for start in range(_STRETCH_BYTES, size - _CHUNK_BYTES, _STRETCH_BYTES):
            file.seek(start)
            state.update(file.read(_SAMPLE_BYTES))
        file.seek(size - _CHUNK_BYTES)
        state.update(file.read(_CHUNK_BYTES))
    return state.hexdigest()


def _identity(node: Mapping[str, Any], weights: Weights | T5Files, *, path_key: str) -> str:
    """The digest of a part of the model: its node, with its files' content for their path."""
    params = {name: value for name, value in node["params"].items() if name != path_key}
    files = {file.path: file for file in weights.files}
    try:
        contents = [hash_weights(files.get(path) or WeightFile(path)) for path in weights.sources]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    return _digest(node["target"], params, contents)


def first_stage_weights(config: Mapping[str, Any]) -> Weights:
    """The weights of the autoencoder that a node describes.

    Raises:
        UserError: it has none, or they are not there.
    """
    path = (config.get("params") or {}).get("ckpt_path")
    if not path:
        raise UserError(
            "first_stage_config.params.ckpt_path is not set; latents of random weights are not "
            "worth keeping: set it, or leave cache_dir out"
        )
    return find_autoencoder(path)


def first_stage_identity(config: Mapping[str, Any]) -> str:
    """The digest of the autoencoder that a node describes.

    Raises:
        UserError: as in `first_stage_weights`, or the files cannot be read.
    """
    return _identity(config, first_stage_weights(config), path_key="ckpt_path")


def check_cacheable(config: Mapping[str, Any]) -> None:
    """Check that embeddings can be kept of the text encoder in the conditioner's node.

    Raises:
        UserError: there is not exactly one embedder, it is not T5, or it is trained.
    """
    nodes = (config.get("params") or {}).get("emb_models") or []
    if len(nodes) != 1 or get_class(nodes[0].get("target")) is not FrozenT5Embedder:
        raise UserError(
            "cache_dir: embeddings are kept of one FrozenT5Embedder in conditioner_config, and "
            "this configuration has something else; leave cache_dir out"
        )
    (node,) = nodes
    if node.get("is_trainable"):
        raise UserError(
            "cache_dir: embeddings of a text encoder with is_trainable cannot be kept; set it to "
            "false, or leave cache_dir out"
        )


def text_weights(config: Mapping[str, Any]) -> T5Files:
    """The files of the text encoder in the conditioner's node.

    Raises:
        UserError: as in `check_cacheable`, or they are not there.
    """
    check_cacheable(config)
    (node,) = config["params"]["emb_models"]
    return find_t5(node["params"]["model_dir"])


def text_identity(config: Mapping[str, Any]) -> str:
    """The digest of the text encoder in the conditioner's node.

    Raises:
        UserError: as in `text_weights`, or the files cannot be read.
    """
    weights = text_weights(config)
    return _identity(config["params"]["emb_models"][0], weights, path_key="model_dir")


def latents_key(
    content: str, settings: Mapping[str, Any], *, identity: str, dtype: torch.dtype
) -> str:
    """The name of a clip's entry.

    It depends on the digest of its file, the frame settings, the autoencoder and its dtype.
    """
    return _digest(VERSION, "moments", content, settings, identity, str(dtype))


def embedding_key(text: str, *, identity: str, dtype: torch.dtype) -> str:
    """The name of a text's entry, which depends on the text, the text encoder and its dtype."""
    return _digest(VERSION, "crossattn", text, identity, str(dtype))


def window_position(key: str) -> float:
    """Where the window of an entry begins in a longer clip: from 0 to below 1, drawn by its key."""
    return int(key[:12], 16) / 16**12


# A file may be written to again in the tick of the clock in which it was looked at, which its
# times would not show. Two seconds are the longest tick that file systems have.
_TICK_SECONDS = 2.0
_DIGEST = re.compile(r"[0-9a-f]{40}")

# Of a file: its size, the times of the last change of its content and of anything, its number.
_State = tuple[int, int, int, int]


class DigestMemory:
    """`hash_file` for files that may have been digested before, as a file in JSON remembers.

    A digest holds for as long as a file's `_State` does. The time of the last change of anything
    is the system's own, so a change of content shows even where it keeps the size and a program
    sets the file's other times back, as copying does.

    May be used by several threads.

    Args:
        path: the file of ``{path of a clip: [state, digest]}``. One that is absent or damaged
            counts as empty, and clips are read then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        # Digests that are not in the file yet, as they are written to it.
        self.new: dict[str, tuple[_State, str]] = {}

    def digest(self, clip: Path) -> str | None:
        """The digest of a clip's file; None where it cannot be read."""
        name = os.path.abspath(clip)
        try:
            looked_at, state = time.time(), _state(clip)
            known, digest = self._known.get(name, (None, ""))
            if known == state:
                return digest
            digest = hash_file(clip)
            is_settled = looked_at - state[2] / 1e9 > _TICK_SECONDS
            if is_settled and _state(clip) == state:
                self.new[name] = (state, digest)
        except OSError:
            return None
        return digest

    def update(
        self, new: Mapping[str, tuple[_State, str]], *, without: Iterable[Path] = ()
    ) -> None:
        """Write what is `new`, of this and of other processes, to the file.

        What other runs have written to it meanwhile stays, but for the clips `without`.
        """
        clips = list(without)
        if not (new or clips):  # as at most starts; the file may be large
            return
        known = _read(self._path)
        updated = {**known, **new}
        for clip in clips:
            updated.pop(os.path.abspath(clip), None)
        if updated == known:
            return
        try:
            with replacing(self._path, shared=True) as partial:
                partial.write_text(json.dumps(updated), "utf-8")
        except UserError as error:  # the next start reads the clips again, that is all
            logger.debug("%s", error)


def _state(path: Path) -> _State:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _read(path: Path) -> dict[str, tuple[_State, str]]:
    try:
        content = json.loads(path.read_text("utf-8"))
        return {
            name: (tuple(state), digest)
            for name, (state, digest) in content.items()
            if _DIGEST.fullmatch(digest)
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.debug("%s is left out: %s", path, error)
        return {}
