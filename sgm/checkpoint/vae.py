"""The weights of the video autoencoder: ``{"state_dict": {…}}`` in ``3d-vae.pt``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.errors import UserError

# Where a checkpoint of the whole engine keeps the autoencoder.
ENGINE_PREFIX = "first_stage_model."


def load_vae_state(
    path: str | Path, ignore_keys: str | Sequence[str] = ("loss",)
) -> dict[str, torch.Tensor]:
    """Name → tensor of the autoencoder in a ``.pt`` or ``.safetensors`` file, mapped from disk.

    Keys that begin with one of `ignore_keys` (or with it, if it is a single text) are left out: the
    discriminator's, for one. Of a checkpoint of the whole engine only the autoencoder's part is
    returned.

    Raises:
        UserError: the file cannot be read (see `read_checkpoint`) or holds no autoencoder.
    """
    path = Path(os.path.expanduser(path))
    tensors = tensors_of(read_checkpoint(path), path, wrapper="state_dict")
    if any(name.startswith(ENGINE_PREFIX) for name in tensors):
        tensors = {
            name.removeprefix(ENGINE_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(ENGINE_PREFIX)
        }
    ignored = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    kept = {k: v for k, v in tensors.items() if not k.startswith(ignored)}
    if not any(name.startswith(("encoder.", "decoder.")) for name in kept):
        raise UserError(
            f"{path} holds no video autoencoder (first key: {next(iter(tensors))!r}); "
            "first_stage_config.params.ckpt_path must name the 3d-vae.pt file"
        )
    return kept
