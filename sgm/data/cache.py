"""The cache of `args.cache_dir`: what autoencoder and text encoder make of the data, made once.

    cache_dir/latents/KEY.safetensors       moments (t', 2c, h, w) of a window of a clip
    cache_dir/embeddings/KEY.safetensors    crossattn (n, d) of a text
    cache_dir/contents.json                 digests of clips, see `DigestMemory`

With it training loads neither of the two. Entries are kept for ever; deleting some, or the whole
folder, does no harm. Several runs may use one folder at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from sgm.data.cache_making import ClipDataset, make_embeddings, make_latents
from sgm.data.cache_store import Store, remove_leftovers
from sgm.data.digest_memory import DigestMemory
from sgm.data.ranks import Ranks
from sgm.errors import UserError


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
            both are built here only if something is absent, one after the other.
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
