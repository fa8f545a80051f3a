"""The text encoder against transformers itself, and what a broken folder says."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import T5EncoderModel, T5ForConditionalGeneration
from transformers import T5Tokenizer as ReferenceTokenizer

from sgm.checkpoint.find import find_t5
from sgm.errors import UserError
from sgm.modules.encoders.modules import FrozenT5Embedder, T5Tokenizer
from tools.make_random_weights import write_t5

MAX_LENGTH = 24
TEXTS = ["a red circle", "", "A Blue Square,  moving up! (100%)", "a black background " * 9]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "t5"
    torch.manual_seed(0)
    write_t5(folder, width=64, num_layers=2)
    # As T5's own tokenizer: unknown characters are one token, not bytes, which transformers'
    # tokenizer would not split into.
    words = folder.parent / "words.txt"
    words.write_text("\n".join(TEXTS * 30))
    SentencePieceTrainer.train(
        input=str(words), model_prefix=str(folder / "spiece"), vocab_size=200, bos_id=-1,
        pad_id=0, eos_id=1, unk_id=2, hard_vocab_limit=False, minloglevel=2,
        required_chars="".join(map(chr, range(33, 127))),
    )  # fmt: skip
    return folder


@pytest.fixture
def broken(t5, tmp_path):
    """A copy that may be broken."""
    return shutil.copytree(t5, tmp_path / "t5")


@pytest.fixture(scope="module")
def embedder(t5):
    return FrozenT5Embedder(str(t5), MAX_LENGTH).eval()


@torch.no_grad()
def test_embeddings_are_those_of_transformers_without_a_mask(t5, embedder):
    reference = T5EncoderModel.from_pretrained(t5, dtype=torch.float32).eval()
    rows = ReferenceTokenizer.from_pretrained(t5)(
        TEXTS, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    expected = reference(input_ids=rows.input_ids).last_hidden_state
    # The same operations on the same weights in the same order.
    torch.testing.assert_close(embedder(TEXTS), expected, rtol=0, atol=1e-6)
    masked = reference(**rows).last_hidden_state
    assert (masked - expected).abs().max() > 1e-2  # so the above does tell the two apart


@torch.no_grad()
@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("place", [".", "text_encoder"])
def test_a_diffusers_pipeline_and_its_text_encoder_give_the_same(
    t5, embedder, tmp_path, variant, place
):
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    (tmp_path / "tokenizer").mkdir()
    folder = shutil.copytree(t5, tmp_path / "text_encoder")
    (folder / "spiece.model").rename(tmp_path / "tokenizer" / "spiece.model")
    (folder / "model.safetensors").rename(folder / f"model{variant}.safetensors")
    found = FrozenT5Embedder(str(tmp_path / place), MAX_LENGTH).eval()
    assert torch.equal(found(TEXTS), embedder(TEXTS))
    expected = ["text_encoder/config.json", "tokenizer/spiece.model"]
    expected.append(f"text_encoder/model{variant}.safetensors")
    assert find_t5(str(tmp_path)).sources == [tmp_path / name for name in expected]


def test_ids_are_those_of_transformers(t5, embedder):
    texts = [*TEXTS, "".join(map(chr, range(32, 127))), "  two  spaces ", "a\tb\nc"]
    expected = ReferenceTokenizer.from_pretrained(t5)(
        texts, padding="max_length", truncation=True, max_length=MAX_LENGTH
    )["input_ids"]
    assert embedder.tokenizer(texts).tolist() == expected


@pytest.mark.parametrize("max_length", [1, 5, 8])
def test_a_cut_text_keeps_its_end_token_and_the_rest_is_known(t5, max_length):
    tokenizer = T5Tokenizer(t5 / "spiece.model", max_length=max_length)
    pieces = tokenizer._pieces
    text = "a red circle moving left on a black background"
    (row,) = tokenizer([text]).tolist()
    assert len(row) == max_length and row[-1] == pieces.eos_id()
    kept, rest = pieces.decode(row[:-1]), tokenizer.overflow(text)
    assert rest and (kept + rest).replace(" ", "") == text.replace(" ", "")


def test_a_text_that_just_fits_is_not_cut(t5):
    text = "a red circle"
    exact = len(T5Tokenizer(t5 / "spiece.model", max_length=99)._pieces.encode(text)) + 1
    assert T5Tokenizer(t5 / "spiece.model", max_length=exact).overflow(text) == ""
    assert T5Tokenizer(t5 / "spiece.model", max_length=exact - 1).overflow(text) != ""


@pytest.fixture
def newer(broken):
    """The folder as transformers saves it now: without the sentencepiece model."""
    ReferenceTokenizer.from_pretrained(broken).save_pretrained(broken)
    (broken / "spiece.model").unlink()
    return broken


@pytest.mark.parametrize("max_length", [1, 6, MAX_LENGTH])
def test_a_tokenizer_json_gives_the_ids_of_the_sentencepiece_model(t5, newer, max_length):
    ours = T5Tokenizer(t5 / "spiece.model", max_length=max_length)
    theirs = T5Tokenizer(newer / "tokenizer.json", max_length=max_length)
    texts = [*TEXTS, "  two   spaces,\tand a tab", "no </s>, no <pad> or <extra_id_0>"]
    assert torch.equal(ours(texts), theirs(texts))
    assert ours(texts).shape == (6, max_length)
    # The number of spaces at the seam is not in the ids.
    rests = [[words.overflow(text).strip() for text in TEXTS] for words in (ours, theirs)]
    assert rests[0] == rests[1] and any(rests[0])


def test_settings_of_a_tokenizer_json_do_not_cut_or_pad(t5, newer):
    path = newer / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    ours = T5Tokenizer(t5 / "spiece.model", max_length=MAX_LENGTH)
    assert torch.equal(T5Tokenizer(path, max_length=MAX_LENGTH)(TEXTS), ours(TEXTS))


def test_embeddings_are_the_same_with_a_tokenizer_json(newer, embedder):
    with torch.no_grad():
        assert torch.equal(FrozenT5Embedder(str(newer), MAX_LENGTH)(TEXTS), embedder(TEXTS))
    assert find_t5(str(newer)).sources[1] == newer / "tokenizer.json"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello", "not a JSON object"),
        ("{}", "not the tokenizer of a T5 encoder"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "not the tokenizer of a T5"),
        ('{"model": {"type": "Unigram"}}', r"read as a tokenizer \(KeyError .vocab."),
        ('{"model": {"type": "Unigram", "unk_id": null, "vocab": [["a", 0]]}}', "no end token"),
        (
            '{"model": {"type": "Unigram", "unk_id": null, "vocab": [["a", 0]]}, "normalizer": '
            '{"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
            "read as a tokenizer .PanicException",
        ),
    ],
)
def test_a_tokenizer_json_of_something_else_is_refused(newer, content, words):
    (newer / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=words) as failure:
        FrozenT5Embedder(str(newer), MAX_LENGTH)
    assert "tokenizer.json" in str(failure.value) and "\n" not in str(failure.value)


def test_a_folder_of_something_else_is_called_that(tmp_path):
    (tmp_path / "3d-vae.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"lacks config.json \(it holds 3d-vae.pt\)"):
        FrozenT5Embedder(str(tmp_path), MAX_LENGTH)


def test_weights_come_in_the_type_asked_for(t5):
    embedder = FrozenT5Embedder(str(t5), MAX_LENGTH, dtype=torch.bfloat16)
    assert {weight.dtype for weight in embedder.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_come_as_transformers_loads_them_in_the_type_asked_for(t5, dtype):
    weights = dict(
        FrozenT5Embedder(str(t5), MAX_LENGTH, dtype=dtype).transformer.named_parameters()
    )
    expected = dict(T5EncoderModel.from_pretrained(t5, dtype=dtype).named_parameters())
    assert weights.keys() == expected.keys()  # the table of words counts once
    assert dtype in {weight.dtype for weight in weights.values()}
    for name, weight in expected.items():
        assert weights[name].dtype == weight.dtype and torch.equal(weights[name], weight)


def test_a_checkpoint_of_the_whole_t5_is_loaded_from_bin_files_too(t5, broken, embedder):
    whole = T5ForConditionalGeneration(T5EncoderModel.from_pretrained(t5).config).float()
    encoder = load_file(t5 / "model.safetensors")
    whole.load_state_dict({name: t.float() for name, t in encoder.items()}, strict=False)
    torch.save(whole.state_dict(), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    loaded = FrozenT5Embedder(str(broken), MAX_LENGTH).state_dict()
    assert loaded.keys() == embedder.state_dict().keys()
    assert all(torch.equal(loaded[name], t) for name, t in embedder.state_dict().items())


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 791656\n"


def drop_weight(folder):
    state = load_file(folder / "model.safetensors")
    del state["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_bin(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def in_shards(folder, name="model-00001-of-00002.safetensors"):
    """The weights as one file of this name, beside a list that names two."""
    (folder / "model.safetensors").rename(folder / name)
    shards = {str(i): f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_a_list_of_shards_beside_weights_in_one_file_is_not_theirs(broken):
    in_shards(broken, "model.safetensors")
    FrozenT5Embedder(str(broken), MAX_LENGTH)


MISTAKES = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not a JSON object"),
    "another model": (lambda f: edit_config(f, model_type="umt5"), "holds 'umt5', not a T5"),
    "no tokenizer": (
        lambda f: (f / "spiece.model").unlink(),
        "lacks spiece.model or tokenizer.json .*the folder tokenizer",
    ),
    "tokenizer pointer": (
        lambda f: (f / "spiece.model").write_text(POINTER),
        "spiece.model is a git-lfs pointer",
    ),
    "tokenizer of something else": (
        lambda f: (f / "spiece.model").write_text("hello"),
        "spiece.model is not a sentencepiece model",
    ),
    "tokenizer page": (lambda f: (f / "spiece.model").write_text("<html>"), "web page"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks weights"),
    "weights pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        "model.safetensors is a git-lfs pointer",
    ),
    "bin pointer": (lambda f: as_bin(f, POINTER.encode()), "bin is a git-lfs pointer"),
    "bin of something else": (
        lambda f: as_bin(f, b"hello, no pickle"),
        "cannot be read as weights",
    ),
    "weights cut off": (
        lambda f: cut(f / "model.safetensors"),
        "model.safetensors is not a whole safetensors file",
    ),
    "no weights in the file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is empty"),
    "a missing weight": (drop_weight, r"its config.json: keys 1 missing .*block.1.layer.1.*wi_0"),
    "more layers": (lambda f: edit_config(f, num_layers=3), r"block\.2\.layer"),
    "a missing shard": (in_shards, "lacks the shard model-00002-of-00002.safetensors, which"),
    "an invalid size": (lambda f: edit_config(f, num_layers="x"), "cannot be loaded: "),
    "another width": (lambda f: edit_config(f, d_model=128), "of another shape"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_broken_folder_is_refused_in_one_sentence(broken, kind):
    spoil, words = MISTAKES[kind]
    spoil(broken)
    with pytest.raises(UserError, match=words) as failure:
        FrozenT5Embedder(str(broken), MAX_LENGTH)
    assert str(broken) in str(failure.value) and "\n" not in str(failure.value)


def test_pointers_of_git_lfs_are_named_when_the_files_are_found(broken):
    (broken / "model.safetensors").write_text(POINTER)
    with pytest.raises(UserError, match="model.safetensors is a git-lfs pointer"):
        find_t5(broken)


def test_pickled_code_in_a_bin_file_is_not_run(broken, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (broken / "model.safetensors").unlink()
    torch.save({"shared.weight": Evil()}, broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled code"):
        FrozenT5Embedder(str(broken), MAX_LENGTH)
    assert not (tmp_path / "ran").exists()
