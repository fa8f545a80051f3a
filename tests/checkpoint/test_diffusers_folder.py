"""Folders as diffusers writes them: the same weights as in SAT format, or one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgm.checkpoint import reading
from sgm.checkpoint.diffusers_folder import find_diffusers_part, find_part, read_diffusers_part
from sgm.checkpoint.find import find_autoencoder
from sgm.checkpoint.table import to_diffusers
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.transformer import (
    MODEL_PREFIX,
    POSITION_TABLE,
    load_transformer,
    read_transformer,
)
from sgm.checkpoint.vae import load_vae_state
from sgm.data.cache_keys import model_digest
from sgm.errors import UserError
from sgm.preflight import T5_EMBEDDER, find_weights
from tests.checkpoint.test_transformer import build, build_on_meta, published, randomise
from tests.models.test_autoencoder_loading import build as build_vae

diffusers = pytest.importorskip("diffusers")

STEM = "diffusion_pytorch_model"
SHARD = f"{STEM}-00001-of-00003.safetensors"
INDEX = f"{STEM}.safetensors.index.json"
# Options with which diffusers writes, and a file that it writes with them.
LAYOUTS = {
    "one file": ({}, f"{STEM}.safetensors"),
    "shards": ({"max_shard_size": "40KB"}, INDEX),
    "fp16": ({"variant": "fp16"}, f"{STEM}.fp16.safetensors"),
    "fp16 shards": (
        {"variant": "fp16", "max_shard_size": "40KB"},
        f"{STEM}.safetensors.index.fp16.json",
    ),
    "bin": ({"safe_serialization": False}, f"{STEM}.bin"),
    "bin shards": (
        {"safe_serialization": False, "max_shard_size": "40KB"},
        f"{STEM}.bin.index.json",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """``sat.pt``, ``3d-vae.pt``, and the folder ``pipe`` with the same weights in shards."""
    root = tmp_path_factory.mktemp("weights")
    network = randomise(build())
    torch.save(published(network), root / "sat.pt")
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=6, sample_width=6, sample_height=4, sample_frames=9,
        max_text_seq_length=5,
    )  # fmt: skip
    weights = to_diffusers(network.half().state_dict(), "transformer", where="ours")
    theirs.half().load_state_dict(dict(weights))
    for name, (options, _) in LAYOUTS.items():
        theirs.save_pretrained(root / name, **options)
    vae = build_vae()
    torch.save({"state_dict": vae.state_dict()}, root / "3d-vae.pt")
    their_vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=[32, 32], down_block_types=["CogVideoXDownBlock3D"] * 2,
        up_block_types=["CogVideoXUpBlock3D"] * 2, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    their_vae.load_state_dict(dict(to_diffusers(vae.state_dict(), "vae", where="ours")))
    shutil.copytree(root / "shards", root / "pipe" / "transformer")
    their_vae.save_pretrained(root / "pipe" / "vae", max_shard_size="300KB")
    (root / "pipe" / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    return root


@pytest.fixture
def pipe(root, tmp_path) -> Path:
    """A copy of the pipeline that may be broken."""
    return shutil.copytree(root / "pipe", tmp_path / "pipe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_what_the_sat_file_holds(root, layout):
    assert (root / layout / LAYOUTS[layout][1]).is_file()
    _, expected, _ = read_transformer(root / "sat.pt")
    path, found, lora = read_transformer(root / layout)
    assert (path, lora) == (root / layout, {})
    assert found.keys() == expected.keys()
    shapes = on_meta(found)
    for name, tensor in expected.items():
        assert found[name].dtype == shapes[name].dtype == torch.float16
        assert shapes[name].is_meta and shapes[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("place", ["pipe", "pipe/transformer", "bin shards"])
def test_a_network_is_filled_as_from_the_sat_file(root, place):
    filled = []
    for load in (root / "sat.pt", root / place):
        network = build_on_meta()
        mark = load_transformer(network, load, dtype=torch.float32, device="cpu")
        filled.append((mark, network.state_dict()))
    (expected_mark, expected), (mark, found) = filled
    assert mark == expected_mark
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert POSITION_TABLE in found and not any(tensor.is_meta for tensor in found.values())


def test_a_matrix_is_read_once_and_only_when_asked_for(root, monkeypatch):
    reads = []
    original = reading._read_tensor

    def recording(file, start, like, path):
        reads.append((file, start, like.ndim))
        return original(file, start, like, path)

    monkeypatch.setattr(reading, "_read_tensor", recording)
    network = build_on_meta()
    read_transformer(root / "pipe")
    assert reads == []
    load_transformer(network, root / "pipe", dtype=torch.float16, device="cpu")
    part = find_part(root / "pipe" / "transformer", "transformer")
    shapes = on_meta(read_diffusers_part(part)).values()
    places = [place for *place, ndim in reads if ndim > 1]
    num_matrices = sum(tensor.ndim > 1 for tensor in shapes)
    assert len(places) == len({(id(file), start) for file, start in places}) == num_matrices


@pytest.mark.parametrize("place", ["pipe", "pipe/vae"])
def test_an_autoencoder_is_that_of_the_sat_file(root, place):
    expected = load_vae_state(root / "3d-vae.pt")
    found = load_vae_state(root / place)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(name.startswith("encoder.") for name in load_vae_state(root / place, "decoder"))
    loaded = build_vae(ckpt_path=str(root / place)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_an_autoencoder_in_a_checkpoint_of_the_whole_engine(root, tmp_path):
    expected = load_vae_state(root / "3d-vae.pt")
    module = {f"first_stage_model.{name}": tensor for name, tensor in expected.items()}
    module[f"{MODEL_PREFIX}time_embed.0.bias"] = torch.ones(1)
    torch.save({"module": module, "iteration": 5}, tmp_path / "engine.pt")
    assert load_vae_state(tmp_path / "engine.pt").keys() == expected.keys()


def test_a_folder_that_is_not_diffusers_is_left_to_others(root, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert find_diffusers_part(tmp_path, "transformer") is None
    assert find_diffusers_part(root / "sat.pt", "transformer") is None
    assert find_diffusers_part(tmp_path / "absent", "vae") is None


def test_a_tag_of_sat_is_found_before_a_diffusers_folder(root, pipe):
    shutil.copy(root / "sat.pt", pipe / "mp_rank_00_model_states.pt")
    assert read_transformer(pipe)[0] == pipe / "mp_rank_00_model_states.pt"


def test_the_identity_of_an_autoencoder_follows_its_weights_not_its_place(pipe, tmp_path):
    def identity(path: Path) -> str:
        node = {"target": "a.B", "params": {"ckpt_path": str(path)}}
        return model_digest(node, find_autoencoder(path))

    known = identity(pipe)
    assert identity(shutil.copytree(pipe, tmp_path / "elsewhere") / "vae") == known
    (shard, *_) = sorted((pipe / "vae").glob("*.safetensors"))
    tensors = load_file(shard)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, shard)
    assert identity(pipe / "vae") != known


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def configure(**changes: object) -> Callable[[Path], None]:
    return lambda pipe: edit_json(pipe / "transformer" / "config.json", **changes)


def point_to(name: object) -> Callable[[Path], None]:
    """Let the index say that a tensor is in the file `name`."""

    def spoil(pipe: Path) -> None:
        index = json.loads((pipe / "transformer" / INDEX).read_text())
        index["weight_map"]["proj_out.bias"] = name
        (pipe / "transformer" / INDEX).write_text(json.dumps(index))

    return spoil


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda pipe: (pipe / name).write_text(content)


def edit_shard(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors in the shard with the bias of the output."""

    def spoil(pipe: Path) -> None:
        index = json.loads((pipe / "transformer" / INDEX).read_text())
        shard = pipe / "transformer" / index["weight_map"]["proj_out.bias"]
        tensors = load_file(shard)
        edit(tensors)
        save_file(tensors, shard)

    return spoil


def swap_parts(pipe: Path) -> None:
    (pipe / "transformer").rename(pipe / "other")
    (pipe / "vae").rename(pipe / "transformer")
    (pipe / "other").rename(pipe / "vae")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
MISTAKES = {
    "CogVideoX-5B": (configure(use_rotary_positional_embeddings=True), "like CogVideoX-5B"),
    "CogVideoX1.5": (configure(patch_size_t=2), "patch_size_t=2, like CogVideoX1.5"),
    "image to video": (configure(ofs_embed_dim=512), "like the image-to-video models"),
    "another activation": (configure(activation_fn="geglu"), "activation_fn='geglu'"),
    "another class": (configure(_class_name="UNet2DModel"), "holds a diffusers 'UNet2DModel'"),
    "parts swapped": (swap_parts, "'AutoencoderKLCogVideoX', but the transformer"),
    "another pipeline": (
        write("model_index.json", '{"_class_name": "StableDiffusionPipeline"}'),
        "of another pipeline .'StableDiffusionPipeline'.",
    ),
    "an index of no pipeline": (write("model_index.json", "{}"), "another pipeline .None."),
    "no JSON for an index": (write("model_index.json", "{"), "model_index.json is damaged"),
    "config of no JSON": (write("transformer/config.json", "{]"), "config.json is damaged"),
    "config of deep JSON": (write("transformer/config.json", "[" * 9999), "config.json is damaged"),
    "config of a list": (write("transformer/config.json", "[]"), "not a JSON object"),
    "a page for config": (write("transformer/config.json", "<html>"), "is a web page"),
    "no config": (lambda p: (p / "transformer" / "config.json").unlink(), "no such file"),
    "no part": (lambda p: shutil.rmtree(p / "transformer"), "lacks the folder transformer"),
    "no shard": (lambda p: (p / "transformer" / SHARD).unlink(), f"lacks the shard {SHARD}"),
    "a pointer": (write(f"transformer/{SHARD}", POINTER), "a git-lfs pointer"),
    "a shard cut off": (write(f"transformer/{SHARD}", "12345678{"), "not a whole safetensors"),
    "index of no JSON": (write(f"transformer/{INDEX}", "weights"), "is damaged: it is not"),
    "index of nothing": (write(f"transformer/{INDEX}", "{}"), "it has no weight_map"),
    "a file elsewhere": (point_to("../vae/config.json"), "lists '../vae/config.json', which"),
    "a file of the root": (point_to("/etc/passwd"), "lists '/etc/passwd', which"),
    "the folder itself": (point_to(".."), "which is not a file in the same folder"),
    "no file's name": (point_to(3), "lacks the shard 3, which"),
    "no weights": (lambda p: (p / "transformer" / INDEX).unlink(), "lacks weights"),
    "quantised weights": (
        edit_shard(lambda t: t.update({"proj_out.bias": t["proj_out.bias"].to(torch.int8)})),
        "proj_out.bias is stored as int8; quantized",
    ),
    "a shape": (
        edit_shard(lambda t: t.update({"proj_out.bias": torch.ones(3)})),
        r"final_layer.linear.bias is \[3\] in the file, \[16\] in the model",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_wrong_folder_is_one_sentence(pipe, kind):
    spoil, words = MISTAKES[kind]
    spoil(pipe)
    with pytest.raises(UserError, match=words) as failure:
        load_transformer(build_on_meta(), pipe, dtype=torch.float32, device="cpu")
    assert str(pipe) in str(failure.value) and "\n" not in str(failure.value)
    assert len(str(failure.value)) < 500


VAE_MISTAKES = {
    "parts swapped": (swap_parts, "'CogVideoXTransformer3DModel', but the vae"),
    "no shard": (lambda p: next((p / "vae").glob("*.safetensors")).unlink(), "lacks the shard"),
    "another norm": (
        lambda p: edit_json(p / "vae" / "config.json", norm_num_groups=16),
        "norm_num_groups=16",
    ),
    "no tensors": (
        lambda p: [save_file({}, shard) for shard in (p / "vae").glob("*.safetensors")],
        "holds no tensors",
    ),
    "no diffusers folder": (
        lambda p: (p / "model_index.json").unlink(),
        "3d-vae.pt does not exist; it must be the autoencoder's weights",
    ),
}


@pytest.mark.parametrize("kind", VAE_MISTAKES)
def test_a_wrong_folder_of_an_autoencoder_is_one_sentence(pipe, kind):
    spoil, words = VAE_MISTAKES[kind]
    spoil(pipe)
    with pytest.raises(UserError, match=words) as failure:
        load_vae_state(pipe)
    assert str(pipe) in str(failure.value) and "\n" not in str(failure.value)


def test_a_file_of_diffusers_names_asks_for_its_folder(root, pipe):
    with pytest.raises(
        UserError, match="holds no transformer in SAT format .*; it must be .* a diffusers folder"
    ):
        read_transformer(root / "one file" / f"{STEM}.safetensors")
    tensors = {"encoder.mid_block.resnets.0.conv1.conv.weight": torch.ones(1)}
    save_file(tensors, pipe / "vae.safetensors")
    with pytest.raises(
        UserError,
        match="ckpt_path: .* holds no video autoencoder in SAT format .* or a diffusers folder",
    ):
        load_vae_state(pipe / "vae.safetensors")


def test_a_sat_file_in_the_place_of_the_other_part_is_one_sentence(root):
    with pytest.raises(UserError, match="3d-vae.pt holds no transformer"):
        read_transformer(root / "3d-vae.pt")
    with pytest.raises(UserError, match="sat.pt holds no video autoencoder"):
        load_vae_state(root / "sat.pt")


EARLY = {
    "transformer/*.safetensors": "transformer lacks the shard",
    "vae/*.safetensors": "vae lacks the shard",
    "vae/config.json": "vae/config.json: no such file",
    "text_encoder/config.json": "text_encoder lacks config.json",
}


@pytest.mark.parametrize("absent", EARLY)
def test_a_gap_is_found_before_anything_is_loaded(pipe, t5_folder, absent):
    shutil.copytree(t5_folder, pipe / "text_encoder")
    embedder = {"target": T5_EMBEDDER, "params": {"model_dir": str(pipe)}}
    model = {
        "first_stage_config": {"params": {"ckpt_path": str(pipe)}},
        "conditioner_config": {"params": {"emb_models": [embedder]}},
    }
    find_weights(model, str(pipe))
    next(pipe.glob(absent)).unlink()
    with pytest.raises(UserError, match=EARLY[absent]):
        find_weights(model, str(pipe))
