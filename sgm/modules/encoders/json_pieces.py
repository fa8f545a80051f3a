"""T5's ``tokenizer.json``, the file that newer transformers save instead of ``spiece.model``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from sgm.checkpoint.weight_file import damaged, read_json

# What is read besides the model. Truncation and padding are ignored.
_SPLITTING = ("normalizer", "pre_tokenizer")
# The only component types and the only `Replace` pattern in T5's files, in all releases of
# transformers. Other patterns are refused, because a regular expression from an untrusted file
# could take exponential time.
_TYPES = {"Sequence", "Precompiled", "Strip", "Replace", "WhitespaceSplit", "Metaspace"}
_PATTERN = " {2,}"
_END, _PADDING = "</s>", "<pad>"


class JsonPieces:
    """Splits texts into pieces as ``tokenizer.json`` defines, with sentencepiece's method names.

    The file was converted from the sentencepiece model, so both give the same ids. The exception is
    a character that is not in the vocabulary: sentencepiece splits it into bytes, but this class
    returns the id for unknown pieces.

    Raises:
        UserError: the file is not a tokenizer, or not T5's tokenizer.
    """

    def __init__(self, path: Path) -> None:
        content = read_json(path)
        if not _is_t5s(content):
            raise damaged(path, "is not the tokenizer of a T5 encoder (a model of type Unigram)")
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(_without_special_tokens(content)))
        except BaseException as error:  # the library has no exception class of its own
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise damaged(path, f"cannot be read as a tokenizer ({reason})") from None
        self._tokenizer.decoder = decoders.Metaspace()

    def _special_id(self, name: str) -> int:
        found = self._tokenizer.token_to_id(_hidden(name))
        return -1 if found is None else found

    def eos_id(self) -> int:
        """Return the id of the end token; -1 if the vocabulary has no end token."""
        return self._special_id(_END)

    def pad_id(self) -> int:
        """Return the id of the padding token; -1 if the vocabulary has no padding token."""
        return self._special_id(_PADDING)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text's pieces, without an end token."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text for piece ids."""
        return self._tokenizer.decode(list(ids))


def _is_t5s(content: Mapping[str, Any]) -> bool:
    """Return whether `content` has a Unigram model, and otherwise only components of T5's file."""
    model = content.get("model")
    text = json.dumps([content.get(key) for key in _SPLITTING])
    types, patterns = (re.findall(rf'"{key}": "(.*?)"', text) for key in ("type", "Regex"))
    is_unigram = isinstance(model, dict) and model.get("type") == "Unigram"
    return is_unigram and _TYPES.issuperset(types) and {_PATTERN}.issuperset(patterns)


def _hidden(name: str) -> str:
    """Rename a vocabulary entry so that no text can match it; the entry keeps its id.

    The new name contains NUL, which never occurs in normalised texts.
    """
    return f"\0{name}"


def _without_special_tokens(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of `content` that split texts, without special tokens.

    Like sentencepiece, the result reads "</s>" in a prompt as plain letters.
    """
    special = {token["content"] for token in content.get("added_tokens") or ()} | {_END, _PADDING}
    model = content["model"]
    vocabulary = [(_hidden(name) if name in special else name, n) for name, n in model["vocab"]]
    kept = {key: content.get(key) for key in _SPLITTING}
    return {"version": "1.0", "added_tokens": [], **kept, "model": {**model, "vocab": vocabulary}}
