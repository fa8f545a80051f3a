"""The weights of the video autoencoder: SAT's ``3d-vae.pt``, or a folder in diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sgm.checkpoint.diffusers_folder import read_diffusers_part
from sgm.checkpoint.find import AUTOENCODER_OPTION, Weights, find_autoencoder, unexpected
from sgm.checkpoint.table import to_sat
from sgm.checkpoint.tensors import chosen
from sgm.errors import UserError

# The autoencoder's names in a checkpoint of the whole engine begin so.
ENGINE_PREFIX = "first_stage_model."


def holds_autoencoder(weights: Weights) -> bool:
    """Whether weights of a transformer are a checkpoint of the whole engine."""
    if weights.folder is not None:
        return False
    (file,) = weights.files
    return any(name.startswith(ENGINE_PREFIX) for name in file.tensors(wrapper="module"))


def load_vae_state(
    path: str | Path | Weights,
    ignore_keys: str | Sequence[str] = ("loss",),
    *,
    option: str = AUTOENCODER_OPTION,
) -> Mapping[str, Tensor]:
    """Name → tensor of the autoencoder under SAT's names, mapped from disk or read on access.

    Args:
        path, option: as in `find_autoencoder`; a file may be a checkpoint of the whole engine too.
        ignore_keys: beginnings of names (or one of them as a text) that are left out, such as the
            discriminator's.

    Raises:
        UserError: the file cannot be read (see `read_weights`) or holds no autoencoder.
    """
    found = find_autoencoder(path, option=option)
    if found.folder is not None:
        tensors = to_sat(read_diffusers_part(found.folder), "vae", where=found.path)
    else:
        (file,) = found.files
        tensors = file.tensors(wrapper="state_dict")
        own = [name for name in tensors if name.startswith(ENGINE_PREFIX)]
        if own:
            tensors = {name.removeprefix(ENGINE_PREFIX): tensors[name] for name in own}
    ignored = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    kept = [name for name in tensors if not name.startswith(ignored)]
    if "encoder.mid_block.resnets.0.conv1.conv.weight" in kept:
        raise UserError(f"{found.path} has diffusers' names; {option} must name its folder")
    if not any(name.startswith(("encoder.", "decoder.")) for name in kept):
        first = next(iter(tensors))
        what = f"{found.path} holds no video autoencoder of SAT format (first key: {first!r})"
        raise unexpected(what, "autoencoder", option)
    return chosen(tensors, kept)
