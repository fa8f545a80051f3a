"""Making the entries of a cache that are absent, shared out over the processes of a run."""

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
from torch.utils.data import DataLoader, Dataset

from sgm.data.cache_keys import (
    embedding_key,
    first_stage_identity,
    hash_file,
    latents_key,
    text_identity,
    window_position,
)
from sgm.data.cache_store import Store
from sgm.data.digest_memory import DigestMemory
from sgm.data.frames import ClipError
from sgm.data.ranks import Ranks
from sgm.errors import UserError
from sgm.inference.progress import Progress
from sgm.models.first_stage import build_first_stage, encode_moments
from sgm.training.batches import checked_batches
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)


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


def _check_unchanged(identity: str, now: str, name: str) -> None:
    """Refuse a model whose files were replaced between their look-up and their loading."""
    if now != identity:
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
        _check_unchanged(identity, first_stage_identity(config), "the autoencoder")
        return first_stage

    share = [by_key[key] for key in ranks.share(absent)]
    failed = _encode_clips(share, build, store=store, num_workers=num_workers)
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
    identity = _identity(partial(text_identity, config), ranks)
    keys = {text: embedding_key(text, identity=identity, dtype=dtype) for text in texts}
    by_key = {key: text for text, key in keys.items()}
    absent = _absent(by_key, store, ranks)
    if absent:
        logger.info("%s: %d of %d texts are to be embedded", store.folder, len(absent), len(by_key))

    def build() -> nn.Module:
        conditioner = instantiate_from_config(config, dtype=dtype, device=device).eval()
        _check_unchanged(identity, text_identity(config), "the text encoder")
        return conditioner

    share = [(key, by_key[key]) for key in ranks.share(absent)]
    if share:
        _embed_texts(share, build, store=store)
        _free_memory()
    ranks.gather(None)  # nobody goes on before all entries are there
    return keys
