"""The weights of the diffusion transformer: finding the file, sorting its keys, filling a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgm.checkpoint.fit import check_fit
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.errors import UserError

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)

MODEL_PREFIX = "model.diffusion_model."
MODEL_FILES = ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.safetensors")
# Of a checkpoint of the whole engine, what belongs to other parts.
OTHER_PARTS = ("conditioner.", "first_stage_model.", "loss.", "loss_fn.", "denoiser.", "model_ema.")
POSITION_TABLE = "mixins.pos_embed.pos_embedding"
_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats
_HINT = "use the configuration that belongs to these weights"


def find_transformer_file(load: str | Path) -> Path:
    """The file that `load` means: a file itself, a folder with ``latest``, or the folder it names.

    Raises:
        UserError: there is no such file; says which one was looked for.
    """
    try:
        return _find_transformer_file(load)
    except OSError as error:  # a name that is too long, a folder of somebody else …
        raise UserError(
            f"load: {str(load)[:_LONGEST_QUOTE]!r} cannot be looked up ({error.strerror}); check "
            "the path and its permissions"
        ) from None


def _find_transformer_file(load: str | Path) -> Path:
    path = Path(os.path.expanduser(load))
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"load: {load} does not exist; it must be the transformer's folder (with the file "
            "'latest' in it) or its .pt file; README tells where to get the weights"
        )
    folder = path
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if any(mark in tag for mark in "/\n\0"):
            raise UserError(
                f"load: {path}/latest holds {tag[:_LONGEST_QUOTE]!r}, not just the name of a "
                "folder beside it; write or download it again"
            )
        folder = path / tag
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"load: {folder / MODEL_FILES[0]} does not exist; expected are {path}/latest with the name "
        f"of a folder, and {MODEL_FILES[0]} in that folder"
    )


def sort_keys(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's tensors of a checkpoint, as (base weights, LoRA matrices).

    Names come out as the plain model's: without prefix, and without ``original``, which LoRA puts
    before the weights of the layers it wraps.

    Raises:
        UserError: the file holds no transformer.
    """
    if any(name.startswith(MODEL_PREFIX) for name in tensors):
        own = {
            name.removeprefix(MODEL_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(MODEL_PREFIX)
        }
        rest = [n for n in tensors if not n.startswith((MODEL_PREFIX, *OTHER_PARTS))]
        if rest:
            logger.warning("%s: %d unknown keys are not used: %s …", path, len(rest), rest[0])
    else:
        own = {n: tensor for n, tensor in tensors.items() if not n.startswith(OTHER_PARTS)}
    if not any(name.startswith(("transformer.", "mixins.")) for name in own):
        raise UserError(
            f"{path} holds no transformer of SAT format (first key: {next(iter(tensors))!r}); "
            "load must name the transformer's weights"
        )
    lora = {n: t for n, t in own.items() if ".matrix_A." in n or ".matrix_B." in n}
    base = {n.replace(".original.", "."): t for n, t in own.items() if n not in lora}
    return base, lora


def _load_lora(network: DiffusionTransformer, lora: dict[str, Tensor], path: Path) -> None:
    """Wrap the layers that LoRA changes, and fill the matrices if the file holds them."""
    if not network.lora_config:
        if lora:
            name, matrix = next((n, t) for n, t in lora.items() if ".matrix_A." in n)
            raise UserError(
                f"{path} holds LoRA matrices of rank {matrix.shape[0]} ({name} …), but the "
                "configuration has no lora_config; add it under model with that r"
            )
        return
    network.add_lora()
    if not lora:
        logger.info("%s holds no LoRA matrices: LoRA starts from zero", path)
        return
    wanted = {n: p for n, p in network.named_parameters() if ".matrix_" in n}
    check_fit(lora, wanted, path=path, hint=_HINT)
    with torch.no_grad():
        for name, matrix in lora.items():
            wanted[name].copy_(matrix)


def load_transformer(
    network: DiffusionTransformer,
    load: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Fill a transformer that was built on the meta device with weights in SAT format.

    Tensors go from the mapped file straight to `device` and `dtype`, one by one, so that host
    memory never holds a second copy. Layers are wrapped for LoRA afterwards, where configured.

    Raises:
        UserError: no such file, not weights, or weights of another model.
    """
    path = find_transformer_file(load)
    base, lora = sort_keys(tensors_of(read_checkpoint(path), path, wrapper="module"), path)
    wanted = network.state_dict()
    if POSITION_TABLE not in base and POSITION_TABLE in wanted:
        base[POSITION_TABLE] = network.mixins["pos_embed"].compute_table()
    check_fit(base, wanted, path=path, hint=_HINT)
    placed = {name: tensor.to(device=device, dtype=dtype) for name, tensor in base.items()}
    network.load_state_dict(placed, assign=True)
    _load_lora(network, lora, path)
