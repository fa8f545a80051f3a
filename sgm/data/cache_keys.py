"""Keys of cache entries, and the digests of files that they are made of.

A key depends on contents only, never on paths or times of files. An entry is found again after its
clip was moved or renamed, but not after the clip was changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sgm.checkpoint.find import T5Files, Weights
from sgm.checkpoint.weight_file import WeightFile
from sgm.distributed import Ranks
from sgm.errors import UserError
from sgm.files import replacing
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.progress import Progress
from sgm.util import get_class

logger = logging.getLogger(__name__)


# Increase this number when a change of the code changes the content of entries: the choice or the
# scaling of frames, the output of the autoencoder or the text encoder, the format of an entry.
VERSION = 1

_CHUNK_BYTES = 1 << 20
# Only samples of a larger file are read. T5-XXL can have 44 GB, too much to read at every start.
WHOLE_BYTES = 1 << 30
# One sample is read per stretch of this size. T5-XXL's matrices are larger, so each is sampled.
_STRETCH_BYTES = 8 << 20
_SAMPLE_BYTES = 1 << 12


def digest_of(*parts: object) -> str:
    """40 hexadecimal digits for values that JSON can represent."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def hash_file(path: Path) -> str:
    """The digest of a file's whole content.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return _hash_all(file)


def _hash_all(file: BinaryIO) -> str:
    state = hashlib.blake2b(digest_size=20)
    while chunk := file.read(_CHUNK_BYTES):
        state.update(chunk)
    return state.hexdigest()


def hash_weights(weights: WeightFile) -> str:
    """The digest of a weight file: of the whole file up to 1 GiB, of samples above that size.

    If the file was read before, the digest is that of the file whose tensors are mapped, even if
    another file has its path now.

    The samples are the file's size, its first and last MiB, and 4 KiB of every 8 MiB. They contain
    the names, types and shapes (the header of safetensors), the checksums of all tensors (in the
    last MiB of a file of torch.save) and a part of every large tensor. Other weights, and weights
    that were trained further, have another digest. An edit of a few numbers in a safetensors file
    may keep the digest.

    Raises:
        OSError: the file cannot be read.
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


# The paths in nodes of the configuration, which keys do not depend on.
_PATHS = ("ckpt_path", "model_dir")


def model_digest(node: Mapping[str, Any], weights: Weights | T5Files) -> str:
    """The digest of a node of the configuration, with the contents of `weights` for their path.

    Raises:
        UserError: a file cannot be read.
    """
    params = {name: value for name, value in node["params"].items() if name not in _PATHS}
    files = {file.path: file for file in weights.files}
    try:
        contents = [hash_weights(files.get(path) or WeightFile(path)) for path in weights.sources]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    return digest_of(node["target"], params, contents)


def check_cacheable(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text encoder's node in the conditioner's node, if its embeddings can be cached.

    Raises:
        UserError: there is not exactly one embedder, it is not T5, or it is trained.
    """
    nodes = (config.get("params") or {}).get("emb_models") or []
    is_t5 = len(nodes) == 1 and get_class(nodes[0].get("target")) is FrozenT5Embedder
    if not is_t5 or nodes[0].get("is_trainable"):
        raise UserError(
            "cache_dir: conditioner_config must have one FrozenT5Embedder and no other embedder, "
            "and the text encoder must not be trained (is_trainable); change that, or leave "
            "cache_dir out"
        )
    return nodes[0]


def window_position(key: str) -> float:
    """The position in [0, 1) of the cached window in a longer clip, drawn from the entry's key."""
    return int(key[:12], 16) / 16**12


# A file that is written twice within one tick of the file system's clock keeps its times. The
# longest tick of a file system is two seconds.
_TICK_SECONDS = 2.0


def clip_digests(
    clips: Iterable[Path], memory: Path, ranks: Ranks, *, num_threads: int
) -> dict[Path, str | None]:
    """The digest of each clip's file; None if the file cannot be read.

    Digests are remembered in the JSON file `memory`, ``{path of a clip: [state, digest]}``, so that
    clips are read once. A missing or damaged file counts as empty. A digest is valid as long as the
    `_state` of the clip is the same.

    All processes must call this with the same clips. They divide the clips among them, and the
    first one updates `memory`.

    Args:
        clips: the clips.
        memory: the file of digests from earlier runs.
        ranks: the processes.
        num_threads: number of threads that read clips.
    """
    known = _read(memory)
    own = ranks.share(list(dict.fromkeys(clips)))
    found: dict[Path, str | None] = {}
    new: dict[str, Any] = {}
    look_up = partial(_look_up, known=known)
    with ThreadPoolExecutor(num_threads) as pool, Progress(len(own), unit="clip") as progress:
        for clip, (digest, state) in zip(own, pool.map(look_up, own), strict=True):
            found[clip] = digest
            if state is not None:
                new[os.path.abspath(clip)] = [state, digest]
            progress.step("looking up latents")
    gathered = ranks.gather((found, new))
    all_new = {name: item for _, part in gathered for name, item in part.items()}
    if ranks.rank == 0 and all_new:  # usually there is none; reading the file may take long
        try:
            with replacing(memory, shared=True) as unfinished:
                # Other runs may have written to the file since.
                unfinished.write_text(json.dumps(_read(memory) | all_new), "utf-8")
        except UserError as error:  # the only consequence: the next start reads the clips again
            logger.debug("%s", error)
    return {clip: content for part, _ in gathered for clip, content in part.items()}


def _look_up(clip: Path, known: Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
    """A clip's digest, and the state to remember with it if it is new and will stay valid."""
    try:
        looked_at, state = time.time(), _state(clip)
        match known.get(os.path.abspath(clip)):
            case [earlier, str(digest)] if earlier == state:
                return digest, None
        digest = hash_file(clip)
        is_settled = looked_at - state[2] / 1e9 > _TICK_SECONDS
        return digest, state if is_settled and _state(clip) == state else None
    except OSError:
        return None, None


def _state(path: Path) -> list[int]:
    """Size, time of the last change of content, of content or metadata (in ns), and inode.

    The time of the last change of content or metadata is set by the system only. It changes with
    the content, even if the size stays the same and a program sets the other times back, as
    copying does.
    """
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        logger.debug("%s is ignored: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}
