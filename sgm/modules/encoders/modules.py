"""The T5 text encoder and its tokenizer, read from folders in Hugging Face or diffusers format."""

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

    The model file itself defines how text is normalised and split. So every version of the
    libraries gives the ids with which the text encoder was trained.

    Args:
        model_file: ``spiece.model``, or a ``tokenizer.json`` that was converted from it.
        max_length: number of ids for each text.

    Raises:
        UserError: the file is not a tokenizer, or has no end token or no padding token.
    """

    def __init__(self, model_file: Path, *, max_length: int) -> None:
        self.max_length = max_length
        self._pieces = _read_pieces(model_file)
        self._eos_id = self._pieces.eos_id()
        self._pad_id = self._pieces.pad_id()
        if min(self._eos_id, self._pad_id) < 0:
            raise damaged(model_file, "has no end token or no padding token, so it is not T5's")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids (b, max_length), int64; truncated texts also end with the end token."""
        rows = []
        for ids in self._pieces.encode(list(texts)):
            row = [*ids[: self.max_length - 1], self._eos_id]
            rows.append(row + [self._pad_id] * (self.max_length - len(row)))
        return torch.tensor(rows, dtype=torch.long)

    def overflow(self, text: str) -> str:
        """Return the end of `text` that exceeds `max_length` tokens; empty if the text fits."""
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
    """A T5 encoder; embeds texts as its last hidden state.

    Padding is not masked, because it was not masked in the training of the diffusion model.

    Args:
        model_dir: folder in Hugging Face's layout, with ``config.json``, ``spiece.model`` (or
            ``tokenizer.json``) and weights as safetensors or .bin shards. See `find_t5` for other
            layouts.
        max_length: number of tokens to which each text is padded or truncated.
        dtype, device: dtype and device of the weights. On the device "meta" only the headers of
            the weights are read and compared with ``config.json``; `load_weights` reads the values.
        streamed: keep the weights in their files, and load the weights of a block to `device` only
            while the block runs. For inference.

    Raises:
        UserError: the folder is not a T5 folder.
    """

    # Keys of older files that have no effect: the weights are read from `model_dir`, and the
    # conditioner decides what is trained.
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
        """Load the values of the weights. Call this once, after a build on the device "meta".

        The arguments have the same meaning as in the constructor.
        """
        weights, dtype = self._mapped, self._dtype
        fill_encoder(self.transformer, weights, dtype=dtype, device=device, streamed=streamed)
        self._streamed_to = torch.device(device) if streamed else None
        self._mapped = {}
        self.weights.release()

    def warn_if_cut(self, text: str) -> None:
        """Log a warning if `text` is too long for the encoder; quote the part that is cut off."""
        cut = self.tokenizer.overflow(text)
        if cut:
            logger.warning(
                "the prompt is longer than %d tokens; cut off: %r", self.tokenizer.max_length, cut
            )

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (b, max_length, d_text) of b texts.

        Each text is embedded separately. So its embedding is bit-identical in every batch, and can
        be replaced by a cached embedding.
        """
        device = self._streamed_to or self.transformer.device
        ids = self.tokenizer(texts).to(device)  # (b, max_length)
        parts = [self.transformer(input_ids=row).last_hidden_state for row in ids.split(1)]
        return torch.cat(parts)
