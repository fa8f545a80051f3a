"""The cache in `args.cache_dir`: latents of clips and embeddings of texts, computed only once.

    cache_dir/latents/KEY.safetensors       moments (t', 2c, h, w) of one window of a clip
    cache_dir/embeddings/KEY.safetensors    crossattn (n, d) of a text
    cache_dir/contents.json                 digests of clips, see `clip_digests`

If the cache is complete, training loads neither the autoencoder nor the text encoder. Entries are
never deleted automatically. A user may delete entries or the whole folder; the next start computes
missing entries. Several runs may use the same folder at the same time.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from sgm.checkpoint.find import T5Files, Weights, find_autoencoder, find_t5
from sgm.data.cache_keys import (
    VERSION,
    check_cacheable,
    clip_digests,
    digest_of,
    hash_file,
    model_digest,
    window_position,
)
from sgm.data.frames import ClipError, no_clip_left
from sgm.data.loader import checked_batches
from sgm.distributed import Ranks
from sgm.errors import UserError
from sgm.files import expanded, make_output_folder, replacing
from sgm.models.autoencoder import build_first_stage, encode_moments
from sgm.progress import Progress
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Partial files older than this belong to killed processes, because writing an entry is faster.
_LEFTOVER_SECONDS = 3600.0


class ClipDataset(Protocol):
    """The interface of datasets that `prepare_cache` needs. `data_video.SFTDataset` has it."""

    clips: list[Path]
    captions: list[str]

    def frame_settings(self) -> Mapping[str, Any]:
        """Return all settings that determine a clip's frames, including ``random_window``."""

    def read_clip(self, index: int, *, position: float = 0.0) -> Tensor:
        """Return a window of clip `index`, (t, 3, h, w) in [-1, 1]; `position` 0 is the first."""


@dataclass(frozen=True)
class Store:
    """A folder of entries ``{folder}/{key}.safetensors``. Each entry contains one tensor.

    Several processes and several runs may use the same folder at the same time.

    Args:
        folder: the folder.
        name: the name of the tensor in each entry.
    """

    folder: Path
    name: str

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def prepare(self) -> None:
        """Create the folder if needed, and remove partial files of killed processes from it.

        Raises:
            UserError: the folder cannot be created or written to.
        """
        make_output_folder(self.folder)
        _remove_leftovers(self.folder)

    def holds(self, key: str) -> bool:
        """Return whether the entry exists and is intact; log a warning if it is damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                file.get_slice(self.name)
            return True
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); it is computed again", path, error)
            return False

    def read(self, key: str) -> Tensor:
        """Return the tensor of an entry.

        Raises:
            UserError: the entry is missing or damaged.
        """
        path = self._path(key)
        try:
            # Not memory-mapped: this process would crash if another one truncated a mapped file.
            return load(path.read_bytes())[self.name]
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(
                f"the cache entry {path} cannot be read ({error}); start again to compute it again "
                "(if you use several machines, cache_dir must be on a shared disk)"
            ) from None

    def write(self, key: str, tensor: Tensor) -> None:
        """Write an entry atomically.

        Raises:
            UserError: the entry cannot be written.
        """
        with replacing(self._path(key), shared=True) as partial_path:
            partial_path.write_bytes(save({self.name: tensor.contiguous().cpu()}))


def _remove_leftovers(folder: Path) -> None:
    """Remove partial files of killed processes from `folder`."""
    for path in folder.glob(".*.partial.*"):
        with suppress(OSError):  # another process may have removed the file
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class _Sample:
    """A clip: its dataset, its index there, the digest of its file, and the key of its latents.

    `content` is the digest. `content` and `key` are "" if the file cannot be read.
    """

    dataset: ClipDataset
    index: int
    content: str
    key: str

    @property
    def clip(self) -> Path:
        return self.dataset.clips[self.index]


class CachedDataset(Dataset):
    """A dataset of ``{"moments": (t', 2c, h, w), "crossattn": (n, d)}``, read from the cache.

    Attributes:
        captions: the caption of each item.
    """

    def __init__(self, cache: Cache, samples: Sequence[_Sample]) -> None:
        self._cache = cache
        self._keys = [sample.key for sample in samples]
        self.captions = [sample.dataset.captions[sample.index] for sample in samples]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read item `index` from the cache.

        Raises:
            UserError: an entry was removed or damaged after the cache was prepared.
        """
        return {
            "moments": self._cache.latents.read(self._keys[index]),
            "crossattn": self._cache.embed([self.captions[index]])["crossattn"][0],
        }


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache that contains every entry that a run needs; made by `prepare_cache`.

    Attributes:
        latents: the latents of clips.
        embeddings: the embeddings of texts.
        samples: the clips that could be decoded.
        text_keys: for each caption and each given text, its key in `embeddings`.
    """

    latents: Store
    embeddings: Store
    samples: Sequence[_Sample]
    text_keys: Mapping[str, str]

    def dataset(self, dataset: Dataset) -> CachedDataset:
        """Return the cached items of `dataset`, in its order.

        The cache must have been prepared for `dataset`. Clips that could not be decoded are
        skipped.

        Raises:
            UserError: no clip could be decoded.
        """
        parts = _parts(dataset)
        kept = [sample for part in parts for sample in self.samples if sample.dataset is part]
        if not kept:
            raise no_clip_left(f"{sum(len(part.clips) for part in parts)} clips")
        return CachedDataset(self, kept)

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning ``{"crossattn": (b, n, d)}`` for `texts`, on the CPU.

        Only captions and the texts that were given to `prepare_cache` are in the cache.

        Raises:
            UserError: an entry was removed or damaged after the cache was prepared.
        """
        return {"crossattn": torch.stack([self.embeddings.read(self.text_keys[t]) for t in texts])}


def _parts(dataset: Dataset) -> list[ClipDataset]:
    """Return the clip datasets that `dataset` is concatenated from, or `dataset` itself.

    Raises:
        UserError: one of them is not a dataset of clips.
    """
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    for part in parts:
        if not hasattr(part, "read_clip"):
            raise UserError(
                f"args.cache_dir: {type(part).__name__} has no clips whose latents can be cached; "
                "remove cache_dir, or use data_video.SFTDataset"
            )
    return cast("list[ClipDataset]", parts)


def prepare_cache(
    datasets: Sequence[Dataset],
    model: Mapping[str, Any],
    *,
    cache_dir: str | Path,
    texts: Sequence[str] = (),
    dtype: torch.dtype,
    device: str | torch.device,
    text_device: str | torch.device | None = None,
    num_workers: int = 0,
) -> Cache:
    """Compute the entries that are missing in the cache.

    All processes that train together must call this with the same arguments. They divide the work
    and wait for each other at the end. If a clip is longer than an item, only one window is cached.
    It is the first window, or, if the dataset has `random_window`, a pseudo-random window that
    depends on the clip's content only. The state of torch's random generator does not change.

    Args:
        datasets: instances of `data_video.SFTDataset`, or of `ConcatDataset` for several of them.
        model: the `model` section with `first_stage_config` and `conditioner_config`. The
            autoencoder and the text encoder are built one after the other, each only if an entry
            is missing. `Weights` objects in the section are used, and then released.
        cache_dir: the folder of the cache.
        texts: texts to embed in addition to all captions.
        dtype: the dtype of the autoencoder and the text encoder.
        device: the device of the autoencoder and the text encoder.
        text_device: the device of the text encoder, if it is not `device`.
        num_workers: number of processes that decode clips, and of threads that hash clips.

    Raises:
        UserError: a dataset has no clips, the configuration or a file is invalid, the folder cannot
            be written to, or an output is not finite.
    """
    folder = expanded(cache_dir)
    latents = Store(folder / "latents", "moments")
    embeddings = Store(folder / "embeddings", "crossattn")
    parts = [part for dataset in datasets for part in _parts(dataset)]
    captions = [caption for part in parts for caption in part.captions]
    with Ranks() as ranks, torch.random.fork_rng(devices=[]):
        for store in (latents, embeddings):
            store.prepare()
        _remove_leftovers(folder)
        node = model["first_stage_config"]
        build = partial(build_first_stage, node, dtype=dtype, device=device)
        weights = find_autoencoder(node["params"]["ckpt_path"])
        autoencoder = _Encoder("the autoencoder", node, weights, build, latents, dtype, ranks)
        memory = folder / "contents.json"
        samples = _prepare_latents(parts, autoencoder, memory=memory, num_workers=num_workers)
        build = partial(
            instantiate_from_config,
            model["conditioner_config"],
            dtype=dtype,
            device=text_device or device,
        )
        node = check_cacheable(model["conditioner_config"])
        files = find_t5(node["params"]["model_dir"])
        text_encoder = _Encoder("the text encoder", node, files, build, embeddings, dtype, ranks)
        text_keys = _prepare_embeddings([*captions, *texts], text_encoder)
    return Cache(latents, embeddings, samples, text_keys)


@dataclass(eq=False)
class _Encoder:
    """The autoencoder or the text encoder, and the store of its outputs.

    The module is built when it is first used.

    Args:
        name: the module's name in messages.
        node: the module's configuration node.
        weights: the module's weight files. They must not change before `get` has built the module.
        build: the function that builds the module.
        store: the store of the module's outputs.
        dtype: the dtype in which the module runs.
        ranks: the processes that train together.
    """

    name: str
    node: Mapping[str, Any]
    weights: Weights | T5Files
    build: Callable[[], nn.Module]
    store: Store
    dtype: torch.dtype
    ranks: Ranks

    def __post_init__(self) -> None:
        self._module: nn.Module | None = None
        self._since = self.weights.state()
        # Only the first process hashes the files, because they can have gigabytes.
        digest = model_digest(self.node, self.weights) if self.ranks.rank == 0 else ""
        self._digest = self.ranks.gather(digest)[0]

    def key(self, *source: object) -> str:
        """Return the key of an entry.

        `source` is a text, or for a clip, the digest of its file and the frame settings.
        """
        return digest_of(VERSION, self.store.name, *source, self._digest, str(self.dtype))

    def own_missing(self, wanted: Mapping[str, T]) -> list[tuple[str, T]]:
        """Return the pairs (key, source) of missing entries that this process must compute.

        `wanted` maps the keys of all required entries to their sources.
        """
        own, store = self.ranks.share([*wanted]), self.store
        missing = set().union(*self.ranks.gather([key for key in own if not store.holds(key)]))
        if missing:
            logger.info("%s: %d of %d entries are missing", store.folder, len(missing), len(wanted))
        return self.ranks.share([(key, wanted[key]) for key in wanted if key in missing])

    def get(self) -> nn.Module:
        """Return the module in evaluation mode; build it if it was not used before.

        Raises:
            UserError: the module cannot be built, or its files have changed.
        """
        if self._module is None:
            self._module = self.build().eval()
            if not self.weights.is_unchanged(self._since):
                raise UserError(
                    f"the files of {self.name} changed while the cache was made; start again"
                )
        return self._module

    def write(self, key: str, output: Tensor, *, source: object) -> None:
        """Write an entry, after a check that all its values are finite.

        Raises:
            UserError: the output for `source` is not finite, or the entry cannot be written.
        """
        if not bool(output.isfinite().all()):
            raise UserError(
                f"cache_dir: the output of {self.name} for {source} is not finite in "
                f"{output.dtype}; try bfloat16 or float32, or check the weights for damage"
            )
        self.store.write(key, output)

    def free(self) -> None:
        """Release the weight files, and the module's CPU and GPU memory if it was built."""
        self.weights.release()
        if self._module is not None:
            self._module = None
            gc.collect()  # stack frames left over from imports may still refer to the module
            torch.cuda.empty_cache()


def _prepare_latents(
    parts: Sequence[ClipDataset], encoder: _Encoder, *, memory: Path, num_workers: int
) -> list[_Sample]:
    """Compute missing latents; return the clips of all `parts` that can be decoded.

    A warning names each clip that cannot be decoded.
    """
    ranks = encoder.ranks
    clips = [clip for part in parts for clip in part.clips]
    contents = clip_digests(clips, memory, ranks, num_threads=max(1, num_workers))
    samples = []
    for part in parts:
        settings = part.frame_settings()
        for index, clip in enumerate(part.clips):
            content = contents[clip] or ""
            key = content and encoder.key(content, settings)
            samples.append(_Sample(part, index, content, key))
    own = encoder.own_missing({sample.key: sample for sample in samples if sample.key})
    failed = _encode_clips([sample for _, sample in own], encoder, num_workers=num_workers)
    encoder.free()
    reasons = {"": "it cannot be read"}
    for found in ranks.gather(failed):
        reasons |= found
    skipped = {sample.clip: reasons[sample.key] for sample in samples if sample.key in reasons}
    if ranks.rank == 0:
        for clip, reason in skipped.items():
            logger.warning("%s is skipped: %s", clip, reason)
    return [sample for sample in samples if sample.key not in reasons]


def _read_window(sample: _Sample) -> Tensor | ClipError:
    """Decode the window of a clip that will be cached, (t, 3, h, w), or return the failure."""
    is_drawn = sample.dataset.frame_settings()["random_window"]
    position = window_position(sample.key) if is_drawn else 0.0
    try:
        video = sample.dataset.read_clip(sample.index, position=position)
    except ClipError as reason:
        return reason
    with suppress(OSError):  # raised if the file was removed
        if hash_file(sample.clip) == sample.content:
            return video
    return ClipError("it was changed while the cache was made")


def _encode_clips(samples: list[_Sample], encoder: _Encoder, *, num_workers: int) -> dict[str, str]:
    """Write the entries of `samples`; return {key: reason} for clips that cannot be decoded.

    The autoencoder is built only after a clip has been decoded. So it is not loaded at all if no
    clip that is missing in the cache can be decoded.
    """
    failed: dict[str, str] = {}
    workers = min(num_workers, len(samples))
    # With batch_size=None, a worker process calls collate_fn for each single sample.
    read: Callable[[Any], Tensor | ClipError] = _read_window
    windows: DataLoader[Tensor | ClipError] = DataLoader(
        cast("Dataset", samples), batch_size=None, num_workers=workers, collate_fn=read
    )
    with Progress(len(samples), unit="clip") as progress:
        for sample, video in zip(samples, checked_batches(windows), strict=True):
            if isinstance(video, ClipError):
                failed[sample.key] = str(video)
            else:
                moments = encode_moments(encoder.get(), video[None])[0]  # (t', 2c, h, w)
                encoder.write(sample.key, moments, source=sample.clip)
            progress.step("encoding clips")
    return failed


@torch.no_grad()
def _prepare_embeddings(texts: Sequence[str], encoder: _Encoder) -> dict[str, str]:
    """Compute missing embeddings; return {text: key}."""
    keys = {text: encoder.key(text) for text in texts}
    own = encoder.own_missing({key: text for text, key in keys.items()})
    with Progress(len(own), unit="text") as progress:
        for key, text in own:
            batch = {name: [text] for name in encoder.get().input_keys}
            encoder.write(key, encoder.get()(batch)["crossattn"][0], source=repr(text))  # (n, d)
            progress.step("embedding texts")
    encoder.free()
    encoder.ranks.gather(None)  # wait until all processes have written their entries
    return keys
