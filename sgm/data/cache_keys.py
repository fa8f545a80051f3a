"""Keys of cache entries, and the file digests from which the keys are computed.

A key depends only on the contents of files, never on their paths or times. So a clip keeps its
entry if it is moved or renamed, but needs a new entry if its content changes.
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


# Increase this number if a code change alters the content of entries: the choice or scaling of
# frames, the output of the autoencoder or the text encoder, or the format of an entry.
VERSION = 1

_CHUNK_BYTES = 1 << 20
# Files up to this size are hashed whole. Larger files are sampled: T5-XXL can have 44 GB, which is
# too much to read at every start.
WHOLE_BYTES = 1 << 30
# One sample is read per stretch of this size. T5-XXL's matrices are larger, so every matrix is
# sampled.
_STRETCH_BYTES = 8 << 20
_SAMPLE_BYTES = 1 << 12


def digest_of(*parts: object) -> str:
    """Return the digest of `parts`, which JSON can represent, as 40 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def hash_file(path: Path) -> str:
    """Return the digest of a file's whole content.

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
    """Return the digest of a weight file. Files up to 1 GiB are read whole, larger ones sampled.

    If `weights` was read before, the digest is computed from the file whose tensors are mapped,
    even if the path now leads to a different file.

    For a large file, the digest covers the size, the first and the last MiB, and 4 KiB of every
    8 MiB. This includes the names, types and shapes (the header of safetensors), the checksums of
    all tensors (in the last MiB of a file of torch.save) and a part of every large tensor. So
    different weights, and weights that were trained further, have a different digest. But editing
    a few numbers in a safetensors file may leave its digest unchanged.

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


# Params of configuration nodes that are paths. Keys do not depend on them.
_PATHS = ("ckpt_path", "model_dir")


def model_digest(node: Mapping[str, Any], weights: Weights | T5Files) -> str:
    """Return the digest of a configuration node; file contents replace its paths.

    `weights` are the files to which the paths lead.

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
    """Check that text embeddings can be cached; return the text encoder's configuration node.

    Args:
        config: the conditioner's configuration node.

    Raises:
        UserError: there is not exactly one embedder, it is not T5, or it is trained.
    """
    nodes = (config.get("params") or {}).get("emb_models") or []
    is_t5 = len(nodes) == 1 and get_class(nodes[0].get("target")) is FrozenT5Embedder
    if not is_t5 or nodes[0].get("is_trainable"):
        raise UserError(
            "cache_dir: conditioner_config must have exactly one FrozenT5Embedder, no other "
            "embedder, and is_trainable: false; change it, or remove cache_dir"
        )
    return nodes[0]


def window_position(key: str) -> float:
    """Return the relative position of the cached window in its clip, in [0, 1); see `read_clip`.

    The position is pseudo-random, but depends only on the entry's key.
    """
    return int(key[:12], 16) / 16**12


# If a file is written twice within one tick of the file system's clock, its times stay the same.
# The longest tick of a file system is two seconds.
_TICK_SECONDS = 2.0


def clip_digests(
    clips: Iterable[Path], memory: Path, ranks: Ranks, *, num_threads: int
) -> dict[Path, str | None]:
    """Return the digest of each clip's file; None if the file cannot be read.

    Digests are stored in the JSON file `memory`, ``{path of a clip: [state, digest]}``, so each
    clip is read only once. If `memory` is missing or damaged, it counts as empty. A stored digest
    is valid as long as the `_state` of the clip stays the same.

    All processes must call this with the same clips. The clips are divided among the processes, and
    the first process updates `memory`.

    Args:
        clips: the clips.
        memory: the file with the digests that earlier runs stored.
        ranks: the processes of the run.
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
            progress.step("hashing clips")
    gathered = ranks.gather((found, new))
    all_new = {name: item for _, part in gathered for name, item in part.items()}
    if ranks.rank == 0 and all_new:  # usually empty; reading the file again may take long
        try:
            with replacing(memory, shared=True) as unfinished:
                # Other runs may have written to the file since.
                unfinished.write_text(json.dumps(_read(memory) | all_new), "utf-8")
        except UserError as error:  # not an error: the next start only reads the clips again
            logger.debug("%s", error)
    return {clip: content for part, _ in gathered for clip, content in part.items()}


def _look_up(clip: Path, known: Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
    """Return a clip's digest and its state. No state means that the digest must not be stored.

    A digest is not stored if `known` has it already or if the clip was changed very recently. Both
    results are None if the clip cannot be read.
    """
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
    """Return a file's size, mtime (content changed, ns), ctime (any change, ns) and inode.

    Only the system can set ctime. It changes whenever the content changes, even if the size stays
    the same and a program sets mtime back, as copying tools do.
    """
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        logger.debug("%s is ignored: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}
