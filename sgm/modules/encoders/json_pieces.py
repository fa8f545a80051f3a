"""T5's ``tokenizer.json``, which newer transformers save instead of ``spiece.model``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from sgm.checkpoint.weight_file import damaged, read_json

_SPLITTING = ("normalizer", "pre_tokenizer")  # beside the model; nothing cuts or pads a text
# The types of their parts in T5's files of all releases of transformers, and the one pattern of
# their `Replace`. A regular expression in a file from a stranger could take exponential time.
_TYPES = {"Sequence", "Precompiled", "Strip", "Replace", "WhitespaceSplit", "Metaspace"}
_PATTERN = " {2,}"
_END, _PADDING = "</s>", "<pad>"


class JsonPieces:
    """The pieces of a ``tokenizer.json``, with the method names of sentencepiece's processor.

    The file is converted from the sentencepiece model, so both give the same ids, except for
    characters that are not in the vocabulary: sentencepiece splits them into bytes, and here they
    are unknown.

    Raises:
        UserError: the file is not a tokenizer, or not T5's.
    """

    def __init__(self, path: Path) -> None:
        content = read_json(path)
        if not _is_t5s(content):
            raise damaged(path, "is not the tokenizer of a T5 encoder (a model of type Unigram)")
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(_without_special_tokens(content)))
        except BaseException as error:  # the library has no class of its own
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise damaged(path, f"is not a tokenizer that can be read ({reason})") from None
        self._tokenizer.decoder = decoders.Metaspace()

    def _special_id(self, name: str) -> int:
        found = self._tokenizer.token_to_id(_hidden(name))
        return -1 if found is None else found

    def eos_id(self) -> int:
        """The id of the end token; -1 if the vocabulary has no end token."""
        return self._special_id(_END)

    def pad_id(self) -> int:
        """The id of the padding token; -1 if the vocabulary has no padding token."""
        return self._special_id(_PADDING)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text's pieces, without an end token."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some pieces."""
        return self._tokenizer.decode(list(ids))


def _is_t5s(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer has a Unigram model, and beside it the components of T5's only."""
    model = content.get("model")
    text = json.dumps([content.get(key) for key in _SPLITTING])
    types, patterns = (re.findall(rf'"{key}": "(.*?)"', text) for key in ("type", "Regex"))
    is_unigram = isinstance(model, dict) and model.get("type") == "Unigram"
    return is_unigram and _TYPES.issuperset(types) and {_PATTERN}.issuperset(patterns)


def _hidden(name: str) -> str:
    """A name that keeps its id in the vocabulary, but that no text contains.

    Normalised texts have no NUL.
    """
    return f"\0{name}"


def _without_special_tokens(content: Mapping[str, Any]) -> dict[str, Any]:
    """What splits texts. "</s>" in a prompt means these letters, as in sentencepiece."""
    special = {token["content"] for token in content.get("added_tokens") or ()} | {_END, _PADDING}
    model = content["model"]
    vocabulary = [(_hidden(name) if name in special else name, n) for name, n in model["vocab"]]
    kept = {key: content.get(key) for key in _SPLITTING}
    return {"version": "1.0", "added_tokens": [], **kept, "model": {**model, "vocab": vocabulary}}
