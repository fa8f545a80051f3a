"""T5's ``tokenizer.json``, which newer transformers save instead of ``spiece.model``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sgm.checkpoint.weight_file import read_json
from sgm.errors import UserError

_SPLITTING = ("normalizer", "pre_tokenizer", "decoder")  # and the model; not cutting and padding
_END, _PADDING = "</s>", "<pad>"


class JsonPieces:
    """The pieces of a ``tokenizer.json``, by those names that sentencepiece's processor has.

    It was made from the sentencepiece model, so texts give the same ids, but for characters that
    the vocabulary lacks: where sentencepiece splits these into bytes, here they are unknown.

    Raises:
        UserError: the file is no tokenizer, or not T5's.
    """

    def __init__(self, path: Path) -> None:
        content = read_json(path)
        model = content.get("model")
        if not (isinstance(model, dict) and model.get("type") == "Unigram"):
            raise UserError(
                f"{path} is not the tokenizer of a T5 encoder (a model of the type Unigram); copy "
                "it from the original again"
            )
        try:
            names = [name for name, _ in model["vocab"]]
            self._tokenizer = Tokenizer.from_str(json.dumps(_without_special_tokens(content)))
        except BaseException as error:  # the library has no class of its own
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise UserError(
                f"{path} is not a tokenizer that can be read ({reason}); copy it from the original "
                "again"
            ) from None
        self._ids = {name: names.index(name) if name in names else -1 for name in (_END, _PADDING)}

    def eos_id(self) -> int:
        """The number of the end token; -1 if there is none."""
        return self._ids[_END]

    def pad_id(self) -> int:
        """The number of the padding; -1 if there is none."""
        return self._ids[_PADDING]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers of each text's pieces, without an end token."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some pieces."""
        return self._tokenizer.decode(list(ids))


def _without_special_tokens(content: dict[str, Any]) -> dict[str, Any]:
    """What splits texts. "</s>" in a prompt means these letters, as in sentencepiece."""
    special = {token["content"] for token in content.get("added_tokens") or ()}
    model = content["model"]
    # After a NUL, which no text has once it is normalised, a name keeps its number but is not met.
    vocabulary = [(f"\0{name}" if name in special else name, n) for name, n in model["vocab"]]
    kept = {key: content.get(key) for key in _SPLITTING}
    return {"version": "1.0", "added_tokens": [], **kept, "model": {**model, "vocab": vocabulary}}
