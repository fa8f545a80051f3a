"""Reads the weights of the diffusion transformer, checks them and loads them into a network."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sgm.checkpoint.diffusers_folder import read_diffusers_part
from sgm.checkpoint.find import find_transformer, is_no_base, no_sat_format
from sgm.checkpoint.lora_formats import is_foreign, lora_shapes
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.table import POSITION_TABLE, to_sat
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.weight_file import Weights
from sgm.errors import UserError

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)

MODEL_PREFIX = "model.diffusion_model."
# The prefixes of other parts' names in a checkpoint of the whole engine.
OTHER_PARTS = ("conditioner.", "first_stage_model.", "loss.", "loss_fn.", "denoiser.", "model_ema.")
_HINT = "use the configuration that belongs to these weights"


def is_lora_matrix(name: str) -> bool:
    """Return whether the weight called `name` is a LoRA matrix."""
    return ".matrix_A." in name or ".matrix_B." in name


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that identify a model by its weights.

    The fingerprint is a digest of all vectors (biases, scales of norms), rounded to float16.
    Therefore only a small part of a mapped file is read, and float32 and float16 weights have the
    same fingerprint, with or without LoRA layers. A copy in bfloat16 has another fingerprint.

    Args:
        tensors: name → tensor of the transformer, with or without the checkpoint's prefix.
    """
    vectors = {
        name.removeprefix(MODEL_PREFIX).replace(".original.", "."): name
        for name, tensor in on_meta(tensors).items()
        if tensor.ndim == 1 and not name.startswith(OTHER_PARTS)
    }
    digest = hashlib.sha256()
    for plain_name, name in sorted(vectors.items()):
        digest.update(f"{plain_name}\0".encode())
        digest.update(tensors[name].detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sort_keys(found: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the transformer's tensors in a SAT file into (base weights, LoRA matrices).

    The returned names are the names in the model without LoRA. They have no prefix and no
    ``original``, which SAT inserts into the weight names of layers with LoRA.
    """
    tensors = found.file.tensors()
    prefix = MODEL_PREFIX if any(name.startswith(MODEL_PREFIX) for name in tensors) else ""
    rest = [name for name in tensors if not name.startswith((prefix, *OTHER_PARTS))]
    if rest:
        logger.warning("%s: %d unknown keys are ignored: %s …", found.path, len(rest), rest[0])
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(OTHER_PARTS)
    }
    lora = {n: t for n, t in own.items() if is_lora_matrix(n)}
    base = {n.replace(".original.", "."): t for n, t in own.items() if n not in lora}
    return base, lora


def fill_lora(network: DiffusionTransformer, lora: Mapping[str, Tensor]) -> None:
    """Copy matrices that `check_lora` has checked into a network that has its LoRA layers."""
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for name, matrix in lora.items():
            weights[name].copy_(matrix)


def check_lora(
    network: DiffusionTransformer, lora: Mapping[str, Tensor], path: str | Path | Weights
) -> None:
    """Check that LoRA matrices from the file `path` fit a network.

    The network need not have its LoRA layers yet.

    Raises:
        UserError: the layers or the rank differ from the network's ``lora_config``, or the network
            has no ``lora_config``.
    """
    if network.lora_config:
        check_fit(lora, lora_shapes(network), path=str(path), hint=_HINT)
        return
    name, matrix = next(iter(lora.items()))
    raise UserError(
        f"{path} holds LoRA matrices of rank {min(matrix.shape)} ({name} …), but the "
        "configuration has no lora_config; add it under model, with this rank as r"
    )


class TransformerTensors(NamedTuple):
    """The tensors of a transformer, under their names in the model without LoRA.

    `path` is the file or folder. The tensors in `base` are mapped from disk or made on access.
    `lora` contains the LoRA matrices in the file.
    """

    path: Path
    base: Mapping[str, Tensor]
    lora: Mapping[str, Tensor]


def read_transformer(load: str | Path | Weights, *, option: str = "load") -> TransformerTensors:
    """Find and read the tensors of a transformer, in SAT's or diffusers' format.

    Args:
        load, option: as in `find_transformer`.

    Raises:
        UserError: the file is missing, is not a weight file, is not CogVideoX-2B, or contains only
            a LoRA.
    """
    found = find_transformer(load, option=option)
    if found.is_folder:
        tensors = read_diffusers_part(found)
        return TransformerTensors(found.path, to_sat(tensors, "transformer", where=found.path), {})
    base, lora = sort_keys(found)
    if is_foreign(base) or (lora and not base):
        raise is_no_base(found.path, found.option)
    if not any(name.startswith(("transformer.", "mixins.")) for name in base):
        raise no_sat_format(found, "load")
    return TransformerTensors(found.path, base, lora)


def check_transformer(
    network: DiffusionTransformer, load: str | Path | Weights
) -> TransformerTensors:
    """Check that a transformer's weights fit a network on the meta device, without reading values.

    Args:
        network: the network.
        load: as in `find_transformer`.

    Returns:
        The weights, for `load_transformer`.

    Raises:
        UserError: as in `read_transformer`; also if the weights belong to another model.
    """
    found = read_transformer(load)
    wanted = network.state_dict()
    metas = on_meta(found.base)
    if POSITION_TABLE not in metas and POSITION_TABLE in wanted:
        metas = {**metas, POSITION_TABLE: wanted[POSITION_TABLE]}
    check_fit(metas, wanted, path=found.path, hint=_HINT)
    if found.lora:
        check_lora(network, found.lora, found.path)
    elif network.lora_config:
        logger.debug("%s has no LoRA matrices; the LoRA starts from zero", found.path)
    return found


def load_transformer(
    network: DiffusionTransformer,
    load: str | Path | Weights | TransformerTensors,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> str:
    """Load the weights of a transformer that was built on the meta device.

    Tensors go one by one from the mapped file directly to `device` and `dtype`, so host memory
    never holds a second copy. LoRA layers are added afterwards if they are configured.

    Args:
        network: the transformer.
        load: as in `find_transformer`, or the result of `check_transformer`.
        dtype, device: the dtype and device of the loaded weights.

    Returns:
        The `fingerprint` of the weights in the file, before rounding to `dtype`.

    Raises:
        UserError: as in `check_transformer`.
    """
    found = load if isinstance(load, TransformerTensors) else check_transformer(network, load)
    placed = {n: tensor.to(device=device, dtype=dtype) for n, tensor in found.base.items()}
    if POSITION_TABLE not in placed and POSITION_TABLE in network.state_dict():
        table = network.mixins["pos_embed"].compute_table()
        placed[POSITION_TABLE] = table.to(device=device, dtype=dtype)
    network.load_state_dict(placed, assign=True)
    network.add_lora()
    fill_lora(network, found.lora)
    return fingerprint(found.base)
