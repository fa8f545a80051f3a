"""LoRAs that diffusers and peft wrote, merged here and compared with what they do there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgm.checkpoint.lora import read_lora
from sgm.checkpoint.lora_formats import METADATA_KEY
from sgm.checkpoint.transformer import read_transformer
from sgm.config import LoraChoice
from sgm.errors import UserError
from sgm.preflight import find_weights
from tests.lora_models import build, build_theirs, merge_loras, predict, randomize

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

ALL = ["to_q", "to_k", "to_v", "to_out.0"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def ours():
    return build()


def train(ours, **settings):
    """diffusers' transformer with a LoRA that does something."""
    theirs = build_theirs(ours)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ALL} | settings
    theirs.add_adapter(peft.LoraConfig(**config))
    randomize(theirs, lora=True)
    return theirs


def save_as_diffusers_scripts_do(theirs, folder):
    diffusers.CogVideoXPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=peft.get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )


def save_as_older_scripts_did(theirs, folder):
    layers = peft.get_peft_model_state_dict(theirs)
    diffusers.CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=layers)


def save_with_peft(theirs, folder):
    config = theirs.peft_config["default"]
    model = peft.get_peft_model(build_theirs(build()), config)
    layers = peft.get_peft_model_state_dict(theirs)
    peft.set_peft_model_state_dict(model, {f"base_model.model.{n}": t for n, t in layers.items()})
    model.save_pretrained(folder)


SAVERS = {
    "diffusers": save_as_diffusers_scripts_do,
    "save_lora_adapter": lambda theirs, folder: theirs.save_lora_adapter(folder),
    "peft": save_with_peft,
}


def assert_merges_to(theirs, path):
    """Merged here, the LoRA in `path` predicts what `theirs` does, and not what the base does."""
    network = build()
    base = predict(network)
    merge_loras(network, [LoraChoice(str(path))])
    prediction = predict(network)
    assert (prediction - base).abs().max() > 0.05
    # As without LoRA: rounding, and the last norm's epsilon, 1e-6 here and 1e-5 there.
    torch.testing.assert_close(prediction, predict(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_lora_of_diffusers_predicts_here_what_it_does_there(ours, tmp_path, saver, place):
    theirs = train(ours)
    SAVERS[saver](theirs, tmp_path / "lora")
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    path = file if place == "file" else file.parent
    matrices, record = read_lora(path)
    assert vars(record) == {"r": 4, "lora_alpha": 6.0, "layer_range": [0, 1], "base": None}
    state = peft.get_peft_model_state_dict(theirs)
    name = "transformer_blocks.1.attn1.to_k.lora_B.weight"
    assert matrices["transformer.layers.1.attention.query_key_value.matrix_B.1"].equal(state[name])
    assert len(matrices) == len(state) == 16
    assert_merges_to(theirs, path)


KINDS = {
    "some layers": {"target_modules": ["to_q", "to_out.0"]},
    "one block": {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
    # With ^ a pattern is the whole name, so the last one matches no layer.
    "ranks": {"rank_pattern": {"to_q": 2, "^transformer_blocks.1.attn1.to_v": 7, "^to_k": 9}},
    "alphas": {"alpha_pattern": {"transformer_blocks.0.attn1.to_k": 1, "to_v": 24}},
    "ranks and alphas": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"1.attn1.to_q": 9}},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_sat_has_no_word_for_is_folded_into_the_matrices(ours, tmp_path, kind):
    theirs = train(ours, **KINDS[kind])
    save_as_diffusers_scripts_do(theirs, tmp_path)
    record = read_lora(tmp_path)[1]
    assert record.r == (7 if kind == "ranks" else 4)
    assert record.layer_range == ([1] if kind == "one block" else [0, 1])
    assert_merges_to(theirs, tmp_path)


def test_layers_that_were_not_trained_stay_bit_for_bit(ours, tmp_path):
    save_as_diffusers_scripts_do(train(ours, target_modules=["to_q"]), tmp_path)
    network = build()
    merge_loras(network, [LoraChoice(str(tmp_path))])
    for name, weight in network.named_parameters():
        rows = 64 if name.endswith("query_key_value.weight") else 0  # q's
        assert weight[rows:].equal(ours.get_parameter(name)[rows:]), name
        assert rows == 0 or not weight[:rows].equal(ours.get_parameter(name)[:rows])


def test_matrices_are_folded_only_where_they_must_be(ours, tmp_path):
    patterns = {"rank_pattern": {"to_q": 8}, "alpha_pattern": {"to_q": 16}}
    theirs = train(ours, lora_alpha=8, **patterns).half()
    save_as_diffusers_scripts_do(theirs, tmp_path)
    matrices, record = read_lora(tmp_path)  # 8 / 4 is 16 / 8
    assert (record.r, record.lora_alpha) == (8, 16.0)
    down = matrices["transformer.layers.0.attention.query_key_value.matrix_A.1"]
    stored = load_file(tmp_path / FILE)["transformer.transformer_blocks.0.attn1.to_k.lora_A.weight"]
    assert down[:4].equal(stored) and not down[4:].any()
    assert {matrix.dtype for matrix in matrices.values()} == {torch.float16}


def test_without_an_alpha_the_rank_is_taken_as_diffusers_does(ours, tmp_path, caplog):
    caplog.set_level("INFO")
    save_as_older_scripts_did(train(ours), tmp_path)
    theirs = build_theirs(ours)
    diffusers.CogVideoXPipeline.load_lora_into_transformer(
        load_file(tmp_path / FILE), transformer=theirs
    )
    caplog.clear()
    assert_merges_to(theirs, tmp_path)
    (message,) = caplog.messages
    assert message.endswith(f"{FILE} does not store its alpha; its rank is used, as in diffusers")
    caplog.clear()
    assert read_lora(tmp_path, alpha=6)[1].lora_alpha == 6 and not caplog.messages
    # It is logged when the LoRA is merged, not when the paths are checked before.
    choice = LoraChoice(str(tmp_path))
    find_weights({"latent_input": True}, None, lora=[choice], random_transformer=True)
    assert not caplog.messages


def test_an_alpha_other_than_the_stored_one_is_refused(ours, tmp_path):
    save_as_diffusers_scripts_do(train(ours), tmp_path)
    assert read_lora(tmp_path, alpha=6)[1].lora_alpha == 6
    with pytest.raises(UserError, match="was trained with lora_alpha=6, not 5"):
        read_lora(tmp_path, alpha=5)
    with pytest.raises(UserError, match="lora_alpha=nan must be a number"):
        read_lora(tmp_path, alpha=float("nan"))


def write(path, names=(), *, rank=2, settings=None, raw=None):
    """A file of diffusers with matrices of these layers, and settings or raw text as metadata."""
    tensors = {}
    for name in names or ["transformer.transformer_blocks.0.attn1.to_q"]:
        tensors[f"{name}.lora_A.weight"] = torch.ones(rank, 8)
        tensors[f"{name}.lora_B.weight"] = torch.ones(8, rank)
    if settings is not None:
        raw = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    save_file(tensors, path, metadata=raw and {METADATA_KEY: raw})
    return path


BLOCK = "transformer.transformer_blocks.0"
REFUSED_NAMES = {
    f"{BLOCK}.ff.net.0.proj": r"do not fit .*ff.net.0.proj.* fuse_lora, unload_lora_w",
    f"{BLOCK}.norm1.linear": "do not fit .*norm1.linear",
    "transformer.proj_out": "do not fit .*proj_out",
    "text_encoder.encoder.block.0.layer.0.SelfAttention.q": "do not fit .*text_encoder",
    "unet.down_blocks.0.attn1.to_q": "do not fit .*unet.down_blocks.* is for CogVideoX-2B",
}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_layers_without_a_place_in_sat_are_named(tmp_path, name):
    names = [name] if name.startswith("unet") else [f"{BLOCK}.attn1.to_q", name]
    with pytest.raises(UserError, match=REFUSED_NAMES[name]):
        read_lora(write(tmp_path / "lora.safetensors", names))


def test_a_layer_under_two_prefixes_is_refused(tmp_path):
    layer = "transformer_blocks.0.attn1.to_q"
    names = [f"transformer.{layer}", f"base_model.model.{layer}"]
    with pytest.raises(UserError, match="2 tensors .*lora_A.weight.* one lora_A and one lora_B"):
        read_lora(write(tmp_path / "lora.safetensors", names))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{BLOCK}.attn1.to_q.lora_magnitude_vector", "do not fit .*lora_magnitude_vector"),
        (f"{BLOCK}.attn1.to_q.dora_scale", "do not fit .*dora_scale"),
        (f"{BLOCK}.attn1.to_q.lora_B.bias", "do not fit .*lora_B.bias"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight", "do not fit .*lora_down"),
        (f"{BLOCK}.attn1.to_k.lora_A.weight", "no two matrices .* for .*to_k; download"),
    ],
)
def test_other_tensors_are_named(tmp_path, name, words):
    path = write(tmp_path / "lora.safetensors")
    save_file(load_file(path) | {name: torch.ones(2, 8)}, path)
    with pytest.raises(UserError, match=words):
        read_lora(path)


SOUND = {"r": 2, "lora_alpha": 2}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"use_dora": True},
            "has use_dora='True', so it is not a plain LoRA; .* merge it in diffusers",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4'"),
        ({"peft_type": "LOHA"}, "has peft_type='LOHA'"),
        ({"r": 3}, r"of \[2, 8\] and \[8, 2\], which do not have rank 3; download or copy it"),
        ({"r": "2"}, "has r='2'; download or copy it"),
        ({"r": None}, "has r=None; download or copy it"),
        ({"lora_alpha": None}, "has lora_alpha=None; download or copy it"),
        ({"lora_alpha": float("nan")}, "has lora_alpha=nan; download or copy it"),
        ({"lora_alpha": 10**400}, "has lora_alpha=1000.*; download or copy it"),
        ({"alpha_pattern": {"to_q": "x"}}, "has alpha_pattern={'to_q': 'x'}; download or copy it"),
        ({"rank_pattern": [2]}, r"has rank_pattern=\[2\]; download or copy it"),
        ({"alpha_pattern": {"(.*)+x": 1}}, "the pattern .* is not the name of a layer"),
    ],
)
def test_unusual_and_damaged_settings_are_one_sentence(tmp_path, settings, words):
    path = write(tmp_path / "lora.safetensors", settings=SOUND | settings)
    with pytest.raises(UserError, match=words) as failure:
        read_lora(path)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [("{", "not a JSON object"), ("[" * 10**5, "not a JSON object"), ("[1]", "not a JSON object")],
)
def test_damaged_metadata_is_one_sentence(tmp_path, raw, words):
    with pytest.raises(UserError, match=f"the metadata of .*{words}"):
        read_lora(write(tmp_path / "lora.safetensors", raw=raw))


def test_damaged_settings_of_peft_are_one_sentence(tmp_path):
    write(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="adapter_config.json is damaged: it is not a JSON object"):
        read_lora(tmp_path)


@pytest.mark.parametrize("place", [".", FILE])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_lora_in_the_place_of_a_model_is_told_where_it_belongs(tmp_path, prefix, place):
    name = f"{prefix}transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({name: torch.ones(1, 2)}, tmp_path / FILE)
    with pytest.raises(UserError, match="is a LoRA, not a whole model; load must name"):
        read_transformer(tmp_path / place)


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "100KB"}], ids=["one", "shards"])
def test_a_folder_that_was_saved_before_its_lora_was_unloaded_is_called_that(ours, tmp_path, save):
    train(ours).save_pretrained(tmp_path, **save)
    with pytest.raises(UserError, match=r"still holds LoRA tensors .*unload_lora_weights\(\)"):
        read_transformer(tmp_path)


@pytest.mark.parametrize("pattern", ["transformer", "transformer/*.safetensors"])
def test_a_whole_model_of_diffusers_is_told_where_it_belongs(ours, tmp_path, pattern):
    build_theirs(ours).save_pretrained(tmp_path / "transformer")
    (path,) = tmp_path.glob(pattern)
    with pytest.raises(UserError, match="is a whole model, not a LoRA; it must be a LoRA"):
        read_lora(path)
