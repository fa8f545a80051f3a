"""The T5 text encoder and its tokenizer, read from Hugging Face's or diffusers' folders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from sgm.checkpoint.find import T5Files, find_t5
from sgm.checkpoint.text_encoder import check_t5, fill_encoder
from sgm.checkpoint.weight_file import damaged
from sgm.modules.encoders.json_pieces import JsonPieces

logger = logging.getLogger(__name__)


class T5Tokenizer:
    """Sentencepiece with T5's conventions: an end token, then padding up to a fixed length.

    The model file itself defines how text is normalised and split, so ids are those that the
    text encoder was trained with, in every version of the libraries.

    Args:
        model_file: ``spiece.model``, or a ``tokenizer.json`` that was made from it.
        max_length: number of ids of every text.

    Raises:
        UserError: the file is not a tokenizer, or it has no end token or no padding.
    """

    def __init__(self, model_file: Path, *, max_length: int) -> None:
        self.max_length = max_length
        self._pieces = _read_pieces(model_file)
        self._eos_id = self._pieces.eos_id()
        self._pad_id = self._pieces.pad_id()
        if min(self._eos_id, self._pad_id) < 0:
            raise damaged(model_file, "has no end token or no padding, so it is not T5's")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (b, max_length), int64. A text that is cut still ends with the end token."""
        rows = []
        for ids in self._pieces.encode(list(texts)):
            row = [*ids[: self.max_length - 1], self._eos_id]
            rows.append(row + [self._pad_id] * (self.max_length - len(row)))
        return torch.tensor(rows, dtype=torch.long)

    def overflow(self, text: str) -> str:
        """The end of `text` that does not fit into `max_length` tokens; empty if all of it fits."""
        (ids,) = self._pieces.encode([text])
        return self._pieces.decode(ids[self.max_length - 1 :])


def _read_pieces(path: Path) -> SentencePieceProcessor | JsonPieces:
    if path.suffix == ".json":
        return JsonPieces(path)
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise damaged(path, "is not a sentencepiece model") from None


class FrozenT5Embedder(nn.Module):
    """A T5 encoder: from texts to its last hidden state.

    Args:
        model_dir: folder in Hugging Face's layout, with ``config.json``, ``spiece.model`` (or
            ``tokenizer.json``) and weights as safetensors or .bin shards; or as in `find_t5`.
        max_length: number of tokens that every text is padded or cut to.
        dtype, device: of the weights. On the device "meta" only their headers are read and
            compared with the folder's config; `load_weights` then reads the values.
        streamed: the weights stay in their files, and those of a block are on `device` only while
            it works. For inference.

    Padding is not masked, as in the training of the diffusion model.

    Raises:
        UserError: the folder is not a T5 folder.
    """

    # Keys of older files. The run chooses the device, and the conditioner what is trained.
    IGNORED_PARAMS = frozenset({"cache_dir", "freeze"})

    def __init__(
        self,
        model_dir: str | Path | T5Files,
        max_length: int = 226,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        streamed: bool = False,
    ) -> None:
        super().__init__()
        self.weights = find_t5(model_dir)
        self._dtype = dtype
        self._streamed_to: torch.device | None = None
        self.tokenizer = T5Tokenizer(self.weights.tokenizer, max_length=max_length)
        self.transformer, self._mapped = check_t5(self.weights, dtype=dtype)
        self.width = self.transformer.config.d_model
        if torch.device(device).type != "meta":
            self.load_weights(device, streamed=streamed)

    def load_weights(self, device: str | torch.device, *, streamed: bool = False) -> None:
        """Put the weights in place. Call it once, after building on the device "meta".

        The arguments are those of the constructor.
        """
        weights, dtype = self._mapped, self._dtype
        fill_encoder(self.transformer, weights, dtype=dtype, device=device, streamed=streamed)
        self._streamed_to = torch.device(device) if streamed else None
        self._mapped = {}
        self.weights.release()

    def warn_if_cut(self, text: str) -> None:
        """Log a warning that quotes the end of `text` if it is too long for the encoder."""
        cut = self.tokenizer.overflow(text)
        if cut:
            logger.warning(
                "the prompt is longer than %d tokens; cut off: %r", self.tokenizer.max_length, cut
            )

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (b, max_length, d_text) of b texts.

        Each text is embedded alone, so that an embedding is the same to the last bit in every
        batch, and a cached embedding can replace it.
        """
        device = self._streamed_to or self.transformer.device
        ids = self.tokenizer(texts).to(device)  # (b, max_length)
        parts = [self.transformer(input_ids=row).last_hidden_state for row in ids.split(1)]
        return torch.cat(parts)
