"""Builds the T5 text encoder, checks its weights and loads them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgm.checkpoint.find import T5Files
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.weight_file import damaged
from sgm.offload import stream_weights

if TYPE_CHECKING:
    from transformers import T5EncoderModel

_TABLE_NAMES = ("encoder.embed_tokens.weight", "shared.weight")
_WIDE = ".wo.weight"


def _build_encoder(files: T5Files) -> T5EncoderModel:
    """Build the encoder that a T5 folder describes, on the meta device (without values)."""
    # Imported here because the import takes seconds and only this function needs it.
    from transformers import T5Config, T5EncoderModel

    try:
        with torch.device("meta"):
            return T5EncoderModel(T5Config.from_dict(dict(files.config)))
    except Exception as error:  # transformers and its validators raise errors of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        folder = f"the T5 folder {files.path}"
        raise damaged(folder, f"cannot be loaded: {reason.rstrip('.')}") from None


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the weight `name` in an encoder of type `dtype`."""
    # Like transformers: in float16 the sums of this layer would overflow.
    return torch.float32 if dtype is torch.float16 and name.endswith(_WIDE) else dtype


def check_t5(files: T5Files, *, dtype: torch.dtype) -> tuple[T5EncoderModel, dict[str, Tensor]]:
    """Check the weights of a text encoder against its config.json. Only file headers are read.

    Args:
        files: from `find_t5`.
        dtype: the dtype of the encoder.

    Returns:
        The encoder on the meta device, in `dtype`, and the weights for `fill_encoder`.

    Raises:
        UserError: weights are missing or damaged, or transformers cannot build the encoder.
    """
    encoder = _build_encoder(files)
    wanted = encoder.state_dict()
    found: dict[str, Tensor] = {}
    for file in files.files:
        found |= file.tensors()
    for name, other in (_TABLE_NAMES, _TABLE_NAMES[::-1]):
        if name in found:  # files have the table under one or both of its names
            found[other] = found[name]
    found = {name: tensor for name, tensor in found.items() if name in wanted}  # drops the decoder
    here, hint = f"the T5 folder {files.path}", "download or copy it again"
    check_fit(found, wanted, path=here, model="its config.json", hint=hint)
    _assign(encoder, {n: weight.to(_dtype_of(n, dtype)) for n, weight in wanted.items()})
    return encoder.eval(), found  # eval() turns dropout off


def fill_encoder(
    encoder: T5EncoderModel,
    found: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    streamed: bool,
) -> None:
    """Load the weights into a text encoder, each from disk directly to `device` and `dtype`.

    `from_pretrained` of transformers would first read all weights into host memory.

    Args:
        encoder, found: from `check_t5`.
        dtype, device: the dtype and device of the loaded weights.
        streamed: keep the weights mapped, in the dtype of the files, without a copy in host memory.
            Each weight is moved to `device` and `dtype` every time its block runs.
    """
    if streamed:
        _assign(encoder, found)
        stack = encoder.encoder
        parts = [stack.embed_tokens, *stack.block, stack.final_layer_norm]
        stream_weights(parts, device, dtype_of=partial(_dtype_of, dtype=dtype))
        return
    for name in found:
        found[name] = found[name].to(device=device, dtype=_dtype_of(name, dtype))
    _assign(encoder, found)


def _assign(encoder: T5EncoderModel, weights: dict[str, Tensor]) -> None:
    encoder.load_state_dict(weights, assign=True)
    encoder.set_input_embeddings(encoder.shared)  # both names share one table
