"""The ids of the bundled tokenizer for odd texts, in both of its file formats."""

import json
from pathlib import Path

import pytest
from transformers import T5Tokenizer as ReferenceTokenizer

from sgm.modules.encoders.modules import T5Tokenizer

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "CogVideoX-tiny-sat" / "t5"
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "token_ids.json").read_text("utf-8"))
TEXTS = {
    "plain": "a red circle moves right on a black background",
    "empty": "",
    "one space": " ",
    "spaces": "  a   red\tcircle \n\n moves ",
    "other spaces": "a\u00a0red\u3000circle\u200bmoves\u2003right",
    "capitals": "A RED Circle, (100%) & 'quoted' \"twice\" -- moves!?",
    "emoji": "a red circle 🔴 👩‍👩‍👧 ❤️",
    "accents": "café cafe\u0301 ﬁne Ångström ½ ①",
    "other scripts": "红色的圆 красный круг דג الأحمر",
    "special tokens": "</s> <pad> <unk> <extra_id_0> <0x0A> \u2581a",
    "control characters": "a\x00b\x07c\x7f\ufffd\ufeff",
    "very long": "a blue square moves left on a white background. " * 500,
    "one long word": "circle" * 2000,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """``spiece.model``, and the ``tokenizer.json`` that transformers makes from it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ReferenceTokenizer.from_pretrained(FOLDER).save_pretrained(folder)
    return {"spiece.model": FOLDER / "spiece.model", "tokenizer.json": folder / "tokenizer.json"}


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_those_of_the_golden(files, name):
    tokenizer = T5Tokenizer(files[name], max_length=226)
    assert GOLDEN[name].keys() == TEXTS.keys()
    for kind, ids in GOLDEN[name].items():
        (row,) = tokenizer([TEXTS[kind]]).tolist()
        assert row == ids + [0] * (226 - len(ids)), kind
