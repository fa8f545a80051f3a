"""The T5 text encoder and its tokenizer, read from Hugging Face's or diffusers' folders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from sgm.checkpoint.fit import differences
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.text_encoder import T5Files, find_t5
from sgm.errors import UserError, first_of
from sgm.modules.encoders.json_pieces import JsonPieces
from sgm.offload import stream_weights

logger = logging.getLogger(__name__)

_TABLE_NAMES = ("encoder.embed_tokens.weight", "shared.weight")
_WIDE = ".wo.weight"
_AGAIN = "copy the folder from the original again"


class T5Tokenizer:
    """Sentencepiece with T5's conventions: an end token, then padding up to a fixed length.

    The model file itself decides how text is normalised and split, so ids are those that the
    text encoder was trained with, whatever the version of the libraries around it.

    Args:
        model_file: ``spiece.model``, or a ``tokenizer.json`` that was made from it.
        max_length: number of ids of every text.

    Raises:
        UserError: the file is neither, or one without end token and padding.
    """

    def __init__(self, model_file: Path, *, max_length: int) -> None:
        self.max_length = max_length
        self._pieces = _read_pieces(model_file)
        self._eos_id = self._pieces.eos_id()
        self._pad_id = self._pieces.pad_id()
        if min(self._eos_id, self._pad_id) < 0:
            raise UserError(
                f"{model_file} has no end token or no padding, so it is not T5's; "
                "copy it from the original again"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (b, max_length), int64; a text that is cut still ends with the end token."""
        rows = []
        for ids in self._pieces.encode(list(texts)):
            row = [*ids[: self.max_length - 1], self._eos_id]
            rows.append(row + [self._pad_id] * (self.max_length - len(row)))
        return torch.tensor(rows, dtype=torch.long)

    def overflow(self, text: str) -> str:
        """The end of `text` that does not fit into `max_length` tokens; empty where all does."""
        (ids,) = self._pieces.encode([text])
        return self._pieces.decode(ids[self.max_length - 1 :])


def _read_pieces(path: Path) -> SentencePieceProcessor | JsonPieces:
    if path.suffix == ".json":
        return JsonPieces(path)
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(
            f"{path} is not a sentencepiece model; copy it from the original again"
        ) from None


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


def encoder_bytes(model_dir: str | Path, *, dtype: torch.dtype) -> int:
    """Memory that the weights of a text encoder take; nothing but its config is read.

    Raises:
        UserError: as in `find_t5`, or transformers cannot build it.
    """
    weights = _build_encoder(find_t5(model_dir)).named_parameters()
    return sum(weight.numel() * _dtype_of(name, dtype).itemsize for name, weight in weights)


def check_t5_weights(files: T5Files) -> None:
    """Compare the weights of a text encoder with its config.json; nothing but names is read.

    Raises:
        UserError: some are absent, or transformers cannot build such an encoder.
    """
    _fitting_weights(files, _build_encoder(files))


def _fitting_weights(files: T5Files, encoder: nn.Module) -> dict[str, Tensor]:
    """The weights that an `encoder` without values wants, mapped from disk."""
    wanted = encoder.state_dict()
    found: dict[str, Tensor] = {}
    for path in files.weights:
        found |= tensors_of(read_checkpoint(path), path, wrapper="module")
    _complete_table(found)
    found = {name: tensor for name, tensor in found.items() if name in wanted}  # no decoder
    unfit = differences(found, wanted)
    gaps = [*unfit["missing"], *unfit["of another shape"], *unfit["of whole numbers"]]
    if gaps:
        raise UserError(
            f"the T5 folder {files.folder} lacks {len(gaps)} of the weights that its config.json "
            f"asks for, or has them in another shape or type ({first_of(gaps)}); {_AGAIN}"
        )
    return found


def _load_encoder(
    files: T5Files, *, dtype: torch.dtype, device: str | torch.device, streamed: bool
) -> nn.Module:
    """The encoder with its weights, each mapped from disk and put straight into type and place.

    With `from_pretrained` of transformers all of them would be in the host's memory first. Where
    they are `streamed` they stay mapped and in the files' type, so that the host holds no copy of
    them either; each is put into type and place on its way, every time.

    Raises:
        UserError: transformers cannot build it, or some of its weights are not in the folder.
    """
    encoder = _build_encoder(files)
    found = _fitting_weights(files, encoder)
    if not streamed:
        for name in found:
            found[name] = found[name].to(device=device, dtype=_dtype_of(name, dtype))
    encoder.load_state_dict(found, assign=True)
    encoder.set_input_embeddings(encoder.shared)  # one table under both of its names
    if streamed:
        stack = encoder.encoder
        parts = [stack.embed_tokens, *stack.block, stack.final_layer_norm]
        stream_weights(parts, device, dtype_of=partial(_dtype_of, dtype=dtype))
    return encoder.eval()  # without dropout


def _complete_table(state: dict[str, Tensor]) -> None:
    """Give the table of words both of its names; files have it under either or both."""
    for name, other in (_TABLE_NAMES, _TABLE_NAMES[::-1]):
        if name in state:
            state[other] = state[name]


class FrozenT5Embedder(nn.Module):
    """Texts to the last hidden state of a T5 encoder.

    Args:
        model_dir: folder in Hugging Face's layout, with ``config.json``, ``spiece.model`` (or
            ``tokenizer.json``) and weights as safetensors or .bin shards; or as in `find_t5`.
        max_length: number of tokens that every text is padded or cut to.
        dtype, device: of the weights.
        streamed: the weights stay in their files, and each block's are on `device` while it works
            only; for inference.

    Padding is not masked: the diffusion model was trained on embeddings made that way.

    Raises:
        UserError: the folder is not a T5 folder.
    """

    # Of older files: the device is the run's, and whether it is trained is the conditioner's word.
    IGNORED_PARAMS = frozenset({"cache_dir", "freeze"})

    def __init__(
        self,
        model_dir: str,
        max_length: int = 226,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        streamed: bool = False,
    ) -> None:
        super().__init__()
        files = find_t5(model_dir)
        self._visited_device = torch.device(device) if streamed else None
        self.tokenizer = T5Tokenizer(files.tokenizer, max_length=max_length)
        self.transformer = _load_encoder(files, dtype=dtype, device=device, streamed=streamed)

    def warn_if_cut(self, text: str) -> None:
        """Log a warning that quotes the end of `text` that the encoder will not see."""
        cut = self.tokenizer.overflow(text)
        if cut:
            logger.warning(
                "the prompt is longer than %d tokens; cut off: %r", self.tokenizer.max_length, cut
            )

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (b, max_length, d_text) of b texts.

        One text at a time, so that an embedding is the same to the last bit whatever else is in
        the batch, and kept ones can stand for it.
        """
        device = self._visited_device or self.transformer.device
        ids = self.tokenizer(texts).to(device)  # (b, max_length)
        parts = [self.transformer(input_ids=row).last_hidden_state for row in ids.split(1)]
        return torch.cat(parts)
