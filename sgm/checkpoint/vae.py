"""The weights of the video autoencoder: SAT's ``3d-vae.pt``, or a folder in diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sgm.checkpoint.diffusers_folder import read_diffusers_part
from sgm.checkpoint.find import AUTOENCODER_OPTION, find_autoencoder, no_sat_format
from sgm.checkpoint.table import to_sat
from sgm.checkpoint.tensors import chosen
from sgm.checkpoint.weight_file import Weights

# The prefix of the autoencoder's names in a checkpoint of the whole engine.
ENGINE_PREFIX = "first_stage_model."


def holds_autoencoder(weights: Weights) -> bool:
    """Return whether `weights`, given for the transformer, are a checkpoint of the whole engine."""
    if weights.is_folder:
        return False
    return any(name.startswith(ENGINE_PREFIX) for name in weights.file.tensors())


def load_vae_state(
    path: str | Path | Weights,
    ignore_keys: str | Sequence[str] = ("loss",),
    *,
    option: str = AUTOENCODER_OPTION,
) -> Mapping[str, Tensor]:
    """Return the autoencoder's tensors under SAT's names, mapped from disk or read on access.

    Args:
        path, option: as in `find_autoencoder`; the file may also be a checkpoint of the whole
            engine.
        ignore_keys: prefix or prefixes; tensors whose names start with one are left out, such as
            the discriminator's.

    Raises:
        UserError: the file cannot be read (see `read_weights`) or contains no autoencoder.
    """
    found = find_autoencoder(path, option=option)
    if found.is_folder:
        tensors = to_sat(read_diffusers_part(found), "vae", where=found.path)
    else:
        tensors = found.file.tensors()
        own = [name for name in tensors if name.startswith(ENGINE_PREFIX)]
        if own:
            tensors = {name.removeprefix(ENGINE_PREFIX): tensors[name] for name in own}
    ignored = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    kept = [name for name in tensors if not name.startswith(ignored)]
    is_diffusers = any(".mid_block." in name for name in kept)
    if is_diffusers or not any(name.startswith(("encoder.", "decoder.")) for name in kept):
        raise no_sat_format(found, "autoencoder")
    return chosen(tensors, kept)
