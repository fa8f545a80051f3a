"""The T5 text encoder: its folder, what must be in it, and its weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from sgm.checkpoint.find import T5Files
from sgm.checkpoint.strict_loading import differences
from sgm.errors import UserError, first_of
from sgm.offload import stream_weights

_TABLE_NAMES = ("encoder.embed_tokens.weight", "shared.weight")
_WIDE = ".wo.weight"
_AGAIN = "copy the folder from the original again"


def _build_encoder(files: T5Files) -> nn.Module:
    """The encoder of a T5 folder on the meta device, without values.

    Raises:
        UserError: transformers cannot build it.
    """
    # Imported here, since it takes seconds and only this function needs it.
    from transformers import T5Config, T5EncoderModel

    try:
        with torch.device("meta"):
            return T5EncoderModel(T5Config.from_dict(dict(files.config)))
    except Exception as error:  # transformers and what it checks values with raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the T5 folder {files.folder} cannot be loaded: {reason.rstrip('.')}; {_AGAIN}"
        ) from None


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a weight in an encoder of type `dtype`."""
    # As transformers does: the range of float16 is too small for what this layer adds up.
    return torch.float32 if dtype is torch.float16 and name.endswith(_WIDE) else dtype


def check_t5(files: T5Files, *, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """Compare the weights of a text encoder with its config.json; only headers are read.

    Returns:
        The encoder on the meta device, in type `dtype`, and the weights for `fill_encoder`.

    Raises:
        UserError: some are missing or damaged, or transformers cannot build such an encoder.
    """
    encoder = _build_encoder(files)
    wanted = encoder.state_dict()
    found: dict[str, Tensor] = {}
    for file in files.files:
        found |= file.tensors(wrapper="module")
    _complete_table(found)
    found = {name: tensor for name, tensor in found.items() if name in wanted}  # no decoder
    unfit = differences(found, wanted)
    gaps = [*unfit["missing"], *unfit["of another shape"], *unfit["of whole numbers"]]
    if gaps:
        raise UserError(
            f"the T5 folder {files.folder} lacks {len(gaps)} of the weights that its config.json "
            f"asks for, or has them in another shape or type ({first_of(gaps)}); {_AGAIN}"
        )
    _assign(encoder, {n: weight.to(_dtype_of(n, dtype)) for n, weight in wanted.items()})
    return encoder.eval(), found  # without dropout


def fill_encoder(
    encoder: nn.Module,
    found: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    streamed: bool,
) -> None:
    """Put the weights of a text encoder, each mapped from disk, straight into type and place.

    With `from_pretrained` of transformers all of them would be in the host's memory first. Where
    they are `streamed` they stay mapped and in the files' type, so that the host holds no copy of
    them either; each is put into type and place on its way, every time.

    Args:
        encoder, found: as `check_t5` returned them.
        dtype, device: of the weights.
        streamed: see above.
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


def _assign(encoder: nn.Module, weights: dict[str, Tensor]) -> None:
    encoder.load_state_dict(weights, assign=True)
    encoder.set_input_embeddings(encoder.shared)  # one table under both of its names


def _complete_table(state: dict[str, Tensor]) -> None:
    """Give the table of words both of its names; files have it under either or both."""
    for name, other in (_TABLE_NAMES, _TABLE_NAMES[::-1]):
        if name in state:
            state[other] = state[name]
