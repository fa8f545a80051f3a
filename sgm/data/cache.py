"""The cache of `args.cache_dir`: what autoencoder and text encoder make of the data, made once.

    cache_dir/latents/KEY.safetensors       moments (t', 2c, h, w) of a window of a clip
    cache_dir/embeddings/KEY.safetensors    crossattn (n, d) of a text
    cache_dir/contents.json                 digests of clips, see `DigestMemory`

With it training loads neither of the two. Entries are kept for ever; deleting some, or the whole
folder, does no harm. Several runs may use one folder at the same time.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from sgm.checkpoint.find import T5Files, Weights
from sgm.checkpoint.weight_file import FileState
from sgm.data.cache_keys import (
    DigestMemory,
    embedding_key,
    first_stage_identity,
    first_stage_weights,
    hash_file,
    latents_key,
    text_identity,
    text_weights,
    window_position,
)
from sgm.data.cache_store import Store, remove_leftovers
from sgm.data.frames import ClipError
from sgm.data.loader import checked_batches
from sgm.distributed import Ranks
from sgm.errors import UserError
from sgm.models.autoencoder import build_first_stage, encode_moments
from sgm.progress import Progress
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """A clip of a dataset, and the names of what is kept of it."""

    clip: Path
    caption: str
    latents_key: str
    embedding_key: str


class CachedDataset(Dataset):
    """Items ``{"moments": (t', 2c, h, w), "crossattn": (n, d)}``, read as they are asked for.

    Attributes:
        clips, captions: of the items, by index.
    """

    def __init__(self, latents: Store, embeddings: Store, entries: Sequence[_Entry]) -> None:
        self._latents = latents
        self._embeddings = embeddings
        self._keys = [(entry.latents_key, entry.embedding_key) for entry in entries]
        self.clips = [entry.clip for entry in entries]
        self.captions = [entry.caption for entry in entries]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item `index`.

        Raises:
            UserError: its entries were removed or damaged after the cache was prepared.
        """
        latents_key, embedding_key = self._keys[index]
        return {
            "moments": self._latents.read(latents_key),
            "crossattn": self._embeddings.read(embedding_key),
        }


class Cache:
    """A prepared cache, see `prepare_cache`."""

    def __init__(
        self,
        latents: Store,
        embeddings: Store,
        *,
        entries: Sequence[tuple[ClipDataset, Sequence[_Entry]]],
        text_keys: Mapping[str, str],
    ) -> None:
        self._latents = latents
        self._embeddings = embeddings
        # Datasets are known by identity; kept here, so that no other takes one's place.
        self._entries = {id(part): (part, found) for part, found in entries}
        self._text_keys = text_keys

    def dataset(self, dataset: Dataset) -> CachedDataset:
        """The kept items of one of the datasets that the cache was prepared for, in its order.

        Clips that could not be decoded are left out.

        Raises:
            UserError: none could be decoded.
        """
        kept: list[_Entry] = []
        for part in _parts(dataset):
            kept += self._entries[id(part)][1]
        if not kept:
            raise UserError(f"none of the {len(dataset)} clips can be decoded; replace their files")
        return CachedDataset(self._latents, self._embeddings, kept)

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning ``{"crossattn": (b, n, d)}``, on the CPU, of captions and given texts.

        Raises:
            UserError: an entry was removed or damaged after the cache was prepared.
        """
        return {
            "crossattn": torch.stack([self._embeddings.read(self._text_keys[t]) for t in texts])
        }


def _parts(dataset: Dataset) -> list[ClipDataset]:
    """The datasets of clips that `dataset` consists of.

    Raises:
        UserError: it is something else.
    """
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    for part in parts:
        if not hasattr(part, "read_clip"):
            raise UserError(
                f"args.cache_dir: {type(part).__name__} has no clips whose latents could be kept; "
                "leave cache_dir out, or use data_video.SFTDataset"
            )
    return list(parts)


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
    """Make what is absent in the cache; all processes that train together must call it alike.

    They share the work, and wait for each other at the end. Of a clip that is longer than an item
    one window is kept: the first, or where the dataset draws windows one that its content decides.
    What torch draws afterwards does not depend on it.

    Args:
        datasets: of `data_video.SFTDataset`, or joined ones.
        model: the `model` section, of which `first_stage_config` and `conditioner_config` are read;
            both are built here only if something is absent, one after the other. Where they hold
            `Weights` that were read already, these are loaded, and then released.
        cache_dir: the folder.
        texts: whose embeddings are needed beside those of all captions.
        dtype, device: in which, and where, autoencoder and text encoder run.
        text_device: of the text encoder, if it is another.
        num_workers: processes that decode clips, and threads that read them.

    Raises:
        UserError: a dataset has no clips, the configuration or a file is wrong, the folder cannot
            be written to, or a result is not finite.
    """
    folder = Path(cache_dir).expanduser()
    latents = Store(folder / "latents", "moments")
    embeddings = Store(folder / "embeddings", "crossattn")
    parts = [part for dataset in datasets for part in _parts(dataset)]
    captions = [caption for part in parts for caption in part.captions]
    with Ranks() as ranks, torch.random.fork_rng(devices=[]):
        together = {"ranks": ranks, "dtype": dtype}
        for store in (latents, embeddings):
            store.prepare()
        remove_leftovers(folder)
        clip_keys = make_latents(
            parts,
            model["first_stage_config"],
            store=latents,
            memory=DigestMemory(folder / "contents.json"),
            device=device,
            num_workers=num_workers,
            **together,
        )
        text_keys = make_embeddings(
            dict.fromkeys([*captions, *texts]),
            model["conditioner_config"],
            store=embeddings,
            device=device if text_device is None else text_device,
            **together,
        )
    entries = []
    for part, keys in zip(parts, clip_keys, strict=True):
        clips = zip(part.clips, part.captions, keys, strict=True)
        entries.append(
            (part, [_Entry(clip, text, key, text_keys[text]) for clip, text, key in clips if key])
        )
    return Cache(latents, embeddings, entries=entries, text_keys=text_keys)


_CHANGED = "it was changed while the cache was made"


class ClipDataset(Protocol):
    """What is asked of a dataset whose items are to be kept: `data_video.SFTDataset`."""

    clips: list[Path]
    captions: list[str]

    def frame_settings(self) -> dict[str, Any]:
        """All that decides which frames a clip gives; ``random_window`` is part of it."""

    def read_clip(self, index: int, *, position: float = 0.0) -> Tensor:
        """A window of clip `index`, (t, 3, h, w) in [-1, 1]; the first one at `position` 0."""


class _Job(NamedTuple):
    """What is kept of clip `index` of a dataset.

    `content` is the digest of the clip's file, `key` the name of the entry; both are None where
    the file cannot be read.
    """

    dataset: ClipDataset
    index: int
    content: str | None
    key: str | None

    @property
    def clip(self) -> Path:
        return self.dataset.clips[self.index]


class _Windows(Dataset):
    """The windows of jobs, as (video (t, 3, h, w), ``""``) or (None, why there is none)."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self._jobs = jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        job = self._jobs[index]
        is_drawn = job.dataset.frame_settings()["random_window"]
        position = window_position(job.key) if is_drawn else 0.0
        try:
            video = job.dataset.read_clip(job.index, position=position)
        except ClipError as reason:
            return None, str(reason)
        # What was just read must be what the entry's name says.
        if _content_of(job.clip) != job.content:
            return None, _CHANGED
        return video, ""


def _content_of(clip: Path) -> str | None:
    """The digest of a clip's file; None where it cannot be read."""
    try:
        return hash_file(clip)
    except OSError:
        return None


def _contents(
    clips: Iterable[Path], ranks: Ranks, *, memory: DigestMemory, num_threads: int
) -> dict[Path, str | None]:
    """`_content_of` each clip, most of them from memory."""
    share = ranks.share(list(dict.fromkeys(clips)))
    found: dict[Path, str | None] = {}
    with ThreadPoolExecutor(num_threads) as pool, Progress(len(share), unit="clip") as progress:
        for clip, content in zip(share, pool.map(memory.digest, share), strict=True):
            found[clip] = content
            progress.step("looking up latents")
    new = _merged(ranks.gather(memory.new))
    if ranks.rank == 0:
        memory.update(new)
    return _merged(ranks.gather(found))


def _merged(parts: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _absent(keys: Iterable[str], store: Store, ranks: Ranks) -> list[str]:
    """Those of `keys` that the store lacks, each once, in the order given."""
    wanted = list(dict.fromkeys(keys))
    lacking = set().union(*ranks.gather([k for k in ranks.share(wanted) if not store.holds(k)]))
    return [key for key in wanted if key in lacking]


def _identity(compute: Callable[[], str], ranks: Ranks) -> str:
    """What `compute` gives on the first process; the others need not read gigabytes."""
    return ranks.gather(compute() if ranks.rank == 0 else "")[0]


def _check_unchanged(weights: Weights | T5Files, since: list[FileState | None], name: str) -> None:
    """Raise UserError where weights that were loaded may be others than the digest says."""
    if not weights.is_unchanged(since):
        raise UserError(f"the files of {name} changed while the cache was made; start again")


def _check_finite(tensor: Tensor, what: object) -> None:
    """Refuse to keep what would spoil every run that reads it."""
    if not bool(tensor.isfinite().all()):
        raise UserError(
            f"cache_dir: what the model makes of {what} is not finite in {tensor.dtype}; its "
            "weights may be damaged, or try bfloat16 or full precision"
        )


def _free_memory() -> None:
    """Give back what a model took that is not used any more, on the GPU too."""
    gc.collect()  # where building it imported modules, frames that refer to it are still there
    torch.cuda.empty_cache()


def _encode_clips(
    jobs: Sequence[_Job], build: Callable[[], nn.Module], *, store: Store, num_workers: int
) -> dict[str, str]:
    """Make the entries of `jobs`; returns key → reason of those that cannot be decoded.

    The autoencoder is built when there is the first video for it: a clip that never can be decoded
    must not load it at each start.
    """
    failed: dict[str, str] = {}
    first_stage = None
    workers = min(num_workers, len(jobs))
    windows = DataLoader(_Windows(jobs), batch_size=None, num_workers=workers)
    with Progress(len(jobs), unit="clip") as progress:
        for job, (video, reason) in zip(jobs, checked_batches(windows), strict=True):
            if video is None:
                failed[job.key] = reason
            else:
                first_stage = first_stage or build()
                moments = encode_moments(first_stage, video[None])[0]  # (t', 2c, h, w)
                _check_finite(moments, job.clip)
                store.write(job.key, moments)
            progress.step("encoding clips")
    return failed


def make_latents(
    datasets: Sequence[ClipDataset],
    config: Mapping[str, Any],
    *,
    store: Store,
    memory: DigestMemory,
    ranks: Ranks,
    dtype: torch.dtype,
    device: str | torch.device,
    num_workers: int,
) -> list[list[str | None]]:
    """For each dataset the keys of its clips; None for one that cannot be decoded, named once.

    `config` is the autoencoder's node; see `sgm.data.cache.prepare_cache` for the rest.
    """
    weights = first_stage_weights(config)
    since = weights.state()
    identity = _identity(partial(first_stage_identity, config), ranks)
    clips = [clip for dataset in datasets for clip in dataset.clips]
    contents = _contents(clips, ranks, memory=memory, num_threads=max(1, num_workers))
    jobs: list[list[_Job]] = []
    for dataset in datasets:
        settings, part = dataset.frame_settings(), []
        for index, clip in enumerate(dataset.clips):
            content = contents[clip]
            key = content and latents_key(content, settings, identity=identity, dtype=dtype)
            part.append(_Job(dataset, index, content, key))
        jobs.append(part)
    by_key = {job.key: job for part in jobs for job in part if job.key}
    absent = _absent(by_key, store, ranks)
    if absent:
        logger.info("%s: %d of %d clips are to be encoded", store.folder, len(absent), len(by_key))

    def build() -> nn.Module:
        first_stage = build_first_stage(config, dtype=dtype, device=device)
        _check_unchanged(weights, since, "the autoencoder")
        return first_stage

    share = [by_key[key] for key in ranks.share(absent)]
    failed = _encode_clips(share, build, store=store, num_workers=num_workers)
    weights.release()
    if share:
        _free_memory()
    failed = _merged(ranks.gather(failed))
    if ranks.rank == 0:
        changed = [by_key[key].clip for key, reason in failed.items() if reason == _CHANGED]
        memory.update({}, without=changed)
    _name_failures(jobs, failed, ranks)
    return [[None if job.key in failed else job.key for job in part] for part in jobs]


def _name_failures(jobs: Iterable[Iterable[_Job]], failed: Mapping[str, str], ranks: Ranks) -> None:
    """A warning, on the first process, for each clip that gives nothing."""
    reasons = {}
    for job in (job for part in jobs for job in part):
        if job.key is None:
            reasons[job.clip] = "it cannot be read"
        elif job.key in failed:
            reasons[job.clip] = failed[job.key]
    for clip, reason in reasons.items() if ranks.rank == 0 else ():
        logger.warning("%s is skipped: %s", clip, reason)


@torch.no_grad()
def _embed_texts(
    texts: Sequence[tuple[str, str]], build: Callable[[], nn.Module], *, store: Store
) -> None:
    """Make the entries of (key, text)."""
    conditioner = build()
    with Progress(len(texts), unit="text") as progress:
        for key, text in texts:
            batch = {name: [text] for name in conditioner.input_keys}
            embedding = conditioner(batch)["crossattn"][0]  # (n, d)
            _check_finite(embedding, repr(text))
            store.write(key, embedding)
            progress.step("embedding texts")


def make_embeddings(
    texts: Iterable[str],
    config: Mapping[str, Any],
    *,
    store: Store,
    ranks: Ranks,
    dtype: torch.dtype,
    device: str | torch.device,
) -> dict[str, str]:
    """Text → its key.

    `config` is the conditioner's node; see `sgm.data.cache.prepare_cache` for the rest.
    """
    weights = text_weights(config)
    since = weights.state()
    identity = _identity(partial(text_identity, config), ranks)
    keys = {text: embedding_key(text, identity=identity, dtype=dtype) for text in texts}
    by_key = {key: text for text, key in keys.items()}
    absent = _absent(by_key, store, ranks)
    if absent:
        logger.info("%s: %d of %d texts are to be embedded", store.folder, len(absent), len(by_key))

    def build() -> nn.Module:
        conditioner = instantiate_from_config(config, dtype=dtype, device=device).eval()
        _check_unchanged(weights, since, "the text encoder")
        return conditioner

    share = [(key, by_key[key]) for key in ranks.share(absent)]
    if share:
        _embed_texts(share, build, store=store)
        _free_memory()
    weights.release()
    ranks.gather(None)  # nobody goes on before all entries are there
    return keys
