"""The cache of `args.cache_dir`: latents of clips and embeddings of texts, computed once.

    cache_dir/latents/KEY.safetensors       moments (t', 2c, h, w) of a window of a clip
    cache_dir/embeddings/KEY.safetensors    crossattn (n, d) of a text
    cache_dir/contents.json                 digests of clips, see `clip_digests`

If the cache is complete, training loads neither the autoencoder nor the text encoder. Nothing
deletes entries. A user may delete entries or the whole folder; the next start computes what is
missing. Several runs may use one folder at the same time.
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
from sgm.files import make_output_folder, replacing
from sgm.models.autoencoder import build_first_stage, encode_moments
from sgm.progress import Progress
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Writing an entry never takes this long, so an older partial file is from a killed process.
_LEFTOVER_SECONDS = 3600.0


class ClipDataset(Protocol):
    """What `prepare_cache` needs of a dataset; `data_video.SFTDataset` has it."""

    clips: list[Path]
    captions: list[str]

    def frame_settings(self) -> Mapping[str, Any]:
        """All settings that decide which frames a clip gives, with ``random_window``."""

    def read_clip(self, index: int, *, position: float = 0.0) -> Tensor:
        """A window of clip `index`, (t, 3, h, w) in [-1, 1]; the first one at `position` 0."""


@dataclass(frozen=True)
class Store:
    """A folder of entries, ``{folder}/{key}.safetensors``, each with one tensor.

    Several processes and several runs may use it at the same time.

    Args:
        folder: the folder.
        name: the name of the tensor in each entry.
    """

    folder: Path
    name: str

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def prepare(self) -> None:
        """Make the folder, and remove the partial files of killed processes from it.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        make_output_folder(self.folder)
        _remove_leftovers(self.folder)

    def holds(self, key: str) -> bool:
        """Whether the entry exists and is whole; logs a warning if it is damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                file.get_slice(self.name)
            return True
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s) and is made anew", path, error)
            return False

    def read(self, key: str) -> Tensor:
        """The tensor of an entry.

        Raises:
            UserError: the entry is missing or damaged.
        """
        path = self._path(key)
        try:
            # Read, not mapped: a mapped file that another process truncates ends this process.
            return load(path.read_bytes())[self.name]
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(
                f"the cache entry {path} cannot be read ({error}); start again to make it anew "
                "(processes on several hosts need a cache_dir on a disk that they share)"
            ) from None

    def write(self, key: str, tensor: Tensor) -> None:
        """Write an entry, whole or not at all.

        Raises:
            UserError: the entry cannot be written.
        """
        with replacing(self._path(key), shared=True) as partial_path:
            partial_path.write_bytes(save({self.name: tensor.contiguous().cpu()}))


def _remove_leftovers(folder: Path) -> None:
    """Remove the partial files of killed processes from a folder."""
    for path in folder.glob(".*.partial.*"):
        with suppress(OSError):  # another process may have removed it
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class _Sample:
    """Clip `index` of a dataset, the digest of its file, and the key of its latents.

    `content` and `key` are empty if the file cannot be read.
    """

    dataset: ClipDataset
    index: int
    content: str
    key: str

    @property
    def clip(self) -> Path:
        return self.dataset.clips[self.index]


class CachedDataset(Dataset):
    """Items ``{"moments": (t', 2c, h, w), "crossattn": (n, d)}``, read from the cache on access.

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
        """Item `index`.

        Raises:
            UserError: an entry was removed or damaged after the cache was prepared.
        """
        return {
            "moments": self._cache.latents.read(self._keys[index]),
            "crossattn": self._cache.embed([self.captions[index]])["crossattn"][0],
        }


@dataclass(frozen=True, eq=False)
class Cache:
    """A prepared cache, see `prepare_cache`.

    Attributes:
        latents: the latents of clips.
        embeddings: the embeddings of texts.
        samples: the clips that could be decoded.
        text_keys: the keys of all captions and given texts in `embeddings`.
    """

    latents: Store
    embeddings: Store
    samples: Sequence[_Sample]
    text_keys: Mapping[str, str]

    def dataset(self, dataset: Dataset) -> CachedDataset:
        """The cached items of a dataset that the cache was prepared for, in its order.

        Clips that could not be decoded are left out.

        Raises:
            UserError: no clip could be decoded.
        """
        parts = _parts(dataset)
        kept = [sample for part in parts for sample in self.samples if sample.dataset is part]
        if not kept:
            raise no_clip_left(f"{sum(len(part.clips) for part in parts)} clips")
        return CachedDataset(self, kept)

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The conditioning ``{"crossattn": (b, n, d)}`` of captions and given texts, on the CPU.

        Raises:
            UserError: an entry was removed or damaged after the cache was prepared.
        """
        return {"crossattn": torch.stack([self.embeddings.read(self.text_keys[t]) for t in texts])}


def _parts(dataset: Dataset) -> list[ClipDataset]:
    """The datasets of clips that `dataset` consists of.

    Raises:
        UserError: one is not a dataset of clips.
    """
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    for part in parts:
        if not hasattr(part, "read_clip"):
            raise UserError(
                f"args.cache_dir: {type(part).__name__} has no clips whose latents can be cached; "
                "leave cache_dir out, or use data_video.SFTDataset"
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
    and wait for each other at the end. If a clip is longer than an item, one window is cached: the
    first one, or, if the dataset draws windows, one that depends on the clip's content. The state
    of torch's random generator does not change.

    Args:
        datasets: datasets of `data_video.SFTDataset`, or `ConcatDataset` of them.
        model: the `model` section with `first_stage_config` and `conditioner_config`. Each is built
            here only if an entry is missing, one after the other. `Weights` in them that were read
            before are used, and then released.
        cache_dir: the folder of the cache.
        texts: texts whose embeddings are needed besides those of all captions.
        dtype: the precision of autoencoder and text encoder.
        device: where autoencoder and text encoder run.
        text_device: where the text encoder runs instead, if given.
        num_workers: number of processes that decode clips, and of threads that read them.

    Raises:
        UserError: a dataset has no clips, the configuration or a file is invalid, the folder cannot
            be written to, or a result is not finite.
    """
    folder = Path(cache_dir).expanduser()
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

    It is built at the first use.

    Args:
        name: its name in messages.
        node: its node of the configuration.
        weights: its files. They must not change between this call and `get`.
        build: builds it.
        store: the entries.
        dtype: the precision in which it runs.
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
        # The first process reads the files; the others need not read gigabytes.
        digest = model_digest(self.node, self.weights) if self.ranks.rank == 0 else ""
        self._digest = self.ranks.gather(digest)[0]

    def key(self, *source: object) -> str:
        """The key of the entry for a text, or for a clip: its file's digest and the settings."""
        return digest_of(VERSION, self.store.name, *source, self._digest, str(self.dtype))

    def own_missing(self, wanted: Mapping[str, T]) -> list[tuple[str, T]]:
        """This process's share of the (key, source) in `wanted` whose entries are missing."""
        own, store = self.ranks.share([*wanted]), self.store
        missing = set().union(*self.ranks.gather([key for key in own if not store.holds(key)]))
        if missing:
            logger.info("%s: %d of %d entries are missing", store.folder, len(missing), len(wanted))
        return self.ranks.share([(key, wanted[key]) for key in wanted if key in missing])

    def get(self) -> nn.Module:
        """The module, in evaluation mode.

        Raises:
            UserError: it cannot be built, or its files have changed.
        """
        if self._module is None:
            self._module = self.build().eval()
            if not self.weights.is_unchanged(self._since):
                raise UserError(
                    f"the files of {self.name} changed while the cache was made; start again"
                )
        return self._module

    def write(self, key: str, output: Tensor, *, source: object) -> None:
        """Write an entry, unless it would spoil every run that reads it.

        Raises:
            UserError: the output for `source` is not finite, or the entry cannot be written.
        """
        if not bool(output.isfinite().all()):
            raise UserError(
                f"cache_dir: the output of {self.name} for {source} is not finite in "
                f"{output.dtype}; its weights may be damaged, or try bfloat16 or full precision"
            )
        self.store.write(key, output)

    def free(self) -> None:
        """Release the files, and the memory of the module if it was built, on the GPU too."""
        self.weights.release()
        if self._module is not None:
            self._module = None
            gc.collect()  # importing its modules may have left frames that refer to it
            torch.cuda.empty_cache()


def _prepare_latents(
    parts: Sequence[ClipDataset], encoder: _Encoder, *, memory: Path, num_workers: int
) -> list[_Sample]:
    """Compute missing latents; returns the clips of all `parts` that can be decoded.

    A warning names each clip that cannot.
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
    """The window of a clip that is cached, (t, 3, h, w), or the reason why there is none."""
    is_drawn = sample.dataset.frame_settings()["random_window"]
    position = window_position(sample.key) if is_drawn else 0.0
    try:
        video = sample.dataset.read_clip(sample.index, position=position)
    except ClipError as reason:
        return reason
    with suppress(OSError):  # the file was removed
        if hash_file(sample.clip) == sample.content:
            return video
    return ClipError("it was changed while the cache was made")


def _encode_clips(samples: list[_Sample], encoder: _Encoder, *, num_workers: int) -> dict[str, str]:
    """Write the entries of `samples`; returns key → reason of those that cannot be decoded.

    The autoencoder is built when the first video is there. A clip that can never be decoded, and
    so is missing at each start, does not load it.
    """
    failed: dict[str, str] = {}
    workers = min(num_workers, len(samples))
    # With batch_size=None, worker processes call collate_fn for one sample at a time.
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
    """Compute missing embeddings; returns text → key."""
    keys = {text: encoder.key(text) for text in texts}
    own = encoder.own_missing({key: text for text, key in keys.items()})
    with Progress(len(own), unit="text") as progress:
        for key, text in own:
            batch = {name: [text] for name in encoder.get().input_keys}
            encoder.write(key, encoder.get()(batch)["crossattn"][0], source=repr(text))  # (n, d)
            progress.step("embedding texts")
    encoder.free()
    encoder.ranks.gather(None)  # no process goes on before all entries are there
    return keys
