"""The weights of the video autoencoder: SAT's ``3d-vae.pt``, or a folder in diffusers' layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sgm.checkpoint.diffusers_folder import (
    diffusers_files,
    find_diffusers_part,
    read_diffusers_part,
)
from sgm.checkpoint.reading import check_weight_file, read_checkpoint, tensors_of
from sgm.checkpoint.table import to_sat
from sgm.errors import UserError

# Where a checkpoint of the whole engine keeps the autoencoder.
ENGINE_PREFIX = "first_stage_model."
SAT_FILE = "3d-vae.pt"  # as published
_OPTION = "model.first_stage_config.params.ckpt_path"
_EXPECTED = (
    "the autoencoder's weights: 3d-vae.pt itself, or a diffusers folder; README tells where to get "
    "them"
)


def _find(path: str | Path, option: str) -> Path:
    """The file of SAT format, or the folder of diffusers' autoencoder.

    Raises:
        UserError: nothing of the kind is there.
    """
    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):
        return place
    if not os.path.isdir(place):
        raise UserError(f"{option}: {place} does not exist; it must be {_EXPECTED}")
    if os.path.isfile(place / SAT_FILE):
        return place / SAT_FILE
    folder = find_diffusers_part(place, "vae")
    if folder is None:
        raise UserError(
            f"{place} is a folder without an autoencoder in it; {option} must be {_EXPECTED}"
        )
    return folder


def holds_autoencoder(path: Path) -> bool:
    """Whether the file or folder of a transformer is a checkpoint of the whole engine."""
    if path.is_dir():
        return False
    tensors = tensors_of(read_checkpoint(path), path, wrapper="module")
    return any(name.startswith(ENGINE_PREFIX) for name in tensors)


def vae_files(path: str | Path) -> list[Path]:
    """The files that the autoencoder's tensors come from: the file itself, or a folder's, sorted.

    Raises:
        UserError: nothing is there, or a folder without an autoencoder in diffusers' layout or with
            another model's, or a file of it is absent or damaged.
    """
    place = _find(path, _OPTION)
    if place.is_file():
        check_weight_file(place)
        return [place]
    read_diffusers_part(place, "vae")
    return diffusers_files(place)


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        _, tensors = read_diffusers_part(path, "vae")
        # Copies, since each tensor as it is would keep a mapping of the whole file of its own.
        return {name: tensor.clone() for name, tensor in to_sat(tensors, "vae", where=path).items()}
    tensors = tensors_of(read_checkpoint(path), path, wrapper="state_dict")
    if any(name.startswith(ENGINE_PREFIX) for name in tensors):
        return {
            name.removeprefix(ENGINE_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(ENGINE_PREFIX)
        }
    return tensors


def load_vae_state(
    path: str | Path, ignore_keys: str | Sequence[str] = ("loss",), *, option: str = _OPTION
) -> dict[str, torch.Tensor]:
    """Name → tensor of the autoencoder under SAT's names; of a file, mapped from disk.

    Args:
        path: a ``.pt`` or ``.safetensors`` file of SAT format, of a checkpoint of the whole engine
            too, the folder of ``3d-vae.pt``, or a diffusers folder, of a pipeline or of its
            autoencoder.
        ignore_keys: beginnings of names (or one of them as a text) that are left out: the
            discriminator's, for one.
        option: where the user gave the path, for messages.

    Raises:
        UserError: the file cannot be read (see `read_checkpoint`) or holds no autoencoder.
    """
    place = _find(path, option)
    tensors = _read(place)
    ignored = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    kept = {k: v for k, v in tensors.items() if not k.startswith(ignored)}
    if "encoder.mid_block.resnets.0.conv1.conv.weight" in kept and place.is_file():
        raise UserError(f"{place} has diffusers' names; {option} must name its folder")
    if not any(name.startswith(("encoder.", "decoder.")) for name in kept):
        raise UserError(
            f"{place} holds no video autoencoder of SAT format (first key: "
            f"{next(iter(tensors))!r}); {option} must be {_EXPECTED}"
        )
    return kept
