"""What the converters of weights refuse: one sentence each, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_weights import CHECKPOINT, Small, hf2sat, nothing_new, refused
from tools.weights.writing import save_sat_transformer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path / "small")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (
            ["--num_layers", 42, "--num_attention_heads", 48],
            ["has num_layers=2", "says num_layers=42"],
        ),
        (["--num_attention_heads", 48], ["has num_attention_heads=2", "=48"]),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused(small, capsys, options, fragments):
    refused(capsys, small.convert(*options), *fragments)
    nothing_new(small.folder, "small.yaml", "transformer", "vae.pt")


@pytest.mark.parametrize(
    ("option", "place", "fragments"),
    [
        ("transformer_ckpt_path", "vae.pt", ["vae.pt", "--transformer_ckpt_path"]),
        ("vae_ckpt_path", f"transformer/{CHECKPOINT}", ["no video autoencoder"]),
        ("vae_ckpt_path", "absent", ["--vae_ckpt_path: ", "does not exist"]),
        ("vae_ckpt_path", ".", ["--vae_ckpt_path: ", "it must be the autoencoder"]),
        ("base", None, ["num_layers=2", "num_layers=30", "2b_infer.yaml", "--base"]),
        ("base", "no.yaml", ["no.yaml: no such file"]),
        ("output_path", "vae.pt", ["vae.pt exists already"]),
        ("output_path", "vae.pt/out", ["cannot be written: Not a directory"]),
        ("output_path", "transformer", ["transformer exists already"]),
        ("text_encoder_path", "t5", ["--text_encoder_path"]),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_written(
    small, capsys, option, place, fragments
):
    code = small.convert(**{option: place and small.folder / place})
    refused(capsys, code, *fragments)
    nothing_new(small.folder, "small.yaml", "transformer", "vae.pt")


def test_a_shipped_configuration_that_fits_is_named(small, capsys, monkeypatch):
    tiny = {"transformer_ckpt_path": ROOT / "CogVideoX-tiny-sat" / "transformer", "base": None}
    config = ROOT / "configs" / "cogvideox_tiny_infer.yaml"
    refused(capsys, small.convert(**tiny, vae_ckpt_path=None), f"--base ({config} matches)")
    monkeypatch.chdir(ROOT)
    vae = {"vae_ckpt_path": ROOT / "CogVideoX-tiny-sat" / "vae", "transformer_ckpt_path": None}
    refused(capsys, small.convert(**vae), f"({config} matches)")
    refused(capsys, small.convert(base="no.yaml"), f"no.yaml: no such file in {ROOT};")


def test_all_paths_that_do_not_exist_are_named(small, capsys):
    small.sections["args"]["load"] = "absent/transformer"
    small.model["first_stage_config"]["params"]["ckpt_path"] = "absent/vae.pt"
    small.write_config()
    code = small.convert(transformer_ckpt_path=None, vae_ckpt_path=None)
    refused(capsys, code, "small.yaml: absent/transformer, absent/vae.pt", "do not exist")


def test_the_folder_of_a_whole_model_is_not_that_of_its_transformer(small, capsys):
    code = small.convert(transformer_ckpt_path=small.folder)
    refused(capsys, code, "--transformer_ckpt_path", f"give {small.transformer}")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """The file of a LoRA, in a folder of its own."""
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    save_file({"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1)}, path)
    return path


@pytest.mark.parametrize("place", ["lora", "lora/pytorch_lora_weights.safetensors"])
@pytest.mark.usefixtures("lora")
def test_a_lora_is_not_a_diffusers_folder(tmp_path, capsys, place):
    code = hf2sat(tmp_path / place, tmp_path / "o")
    refused(capsys, code, f"{tmp_path / place} is not a readable diffusers folder", "LoRAs")


def test_one_file_of_a_folder_is_refused(small, lora, tmp_path, capsys):
    assert small.convert(vae_ckpt_path=None) == 0
    folder = small.folder / "out" / "transformer"
    code = hf2sat(folder / "diffusion_pytorch_model.safetensors", tmp_path / "o")
    refused(capsys, code, "--input_path must name a local CogVideoX-2B folder")
    shutil.copy(lora, small.folder / "out")  # beside a model it does not count
    assert hf2sat(small.folder / "out", tmp_path / "o") == 0


def test_a_file_with_a_missing_tensor_is_refused(small, capsys):
    del small.base["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    shutil.rmtree(small.transformer)
    save_sat_transformer(small.transformer, small.base)
    refused(capsys, small.convert(), "missing", "transformer.layers.1.mlp.dense_h_to_4h.bias")


@pytest.mark.parametrize("key", ["scale_factor", "shift_scale"])
def test_a_configuration_without_a_number_is_refused(small, capsys, key):
    params = small.model["sampler_config"]["params"]["discretization_config"]["params"]
    (small.model if key == "scale_factor" else params)[key] = "much"
    small.write_config()
    refused(capsys, small.convert(), f"{key}='much'", "must be a positive number")


def test_what_diffusers_cannot_express_is_refused(small, capsys):
    small.model["sampler_config"]["target"] = "sgm.modules.diffusionmodules.sampling.Other"
    small.write_config()
    refused(capsys, small.convert(), "no scheduler for the sampler")
    position = small.model["network_config"]["params"]["modules"]["pos_embed_config"]["params"]
    position["width_interpolation"] = 1.25
    small.write_config()
    refused(capsys, small.convert(), "1.875", "1.25")


@pytest.mark.parametrize(
    ("absent", "fragment"),
    [
        ("config.json", "config.json"),
        ("spiece.model", "spiece.model"),
        ("model.safetensors", "lacks weights"),
        ("shard", "model-00009"),
    ],
)
def test_a_t5_folder_with_a_missing_file_is_refused(
    small, t5_folder, tmp_path, capsys, absent, fragment
):
    t5 = shutil.copytree(t5_folder, tmp_path / "t5")
    if absent == "shard":
        (t5 / "model.safetensors").rename(t5 / "model-00008-of-00009.safetensors")
        index = {"weight_map": {"a": "model-00009-of-00009.safetensors"}}
        (t5 / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (t5 / absent).unlink()
    refused(capsys, small.convert("--text_encoder_path", t5), "T5 folder", fragment)
    nothing_new(small.folder, "small.yaml", "transformer", "vae.pt")


def test_a_t5_that_sampling_would_refuse_is_not_converted(small, t5_folder, tmp_path, capsys):
    t5 = shutil.copytree(t5_folder, tmp_path / "t5")
    edit_json(t5 / "config.json", num_layers=9)
    refused(
        capsys,
        small.convert("--text_encoder_path", t5),
        "T5 folder",
        "does not fit its config.json",
    )
    nothing_new(small.folder, "small.yaml", "transformer", "vae.pt")


@pytest.mark.parametrize("option", ["transformer_ckpt_path", "output_path"])
def test_an_empty_path_is_a_mistake(small, capsys, option):
    with pytest.raises(SystemExit) as end:
        small.convert(**{option: ""})
    assert end.value.code == 2 and "invalid path value: ''" in capsys.readouterr().err


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD = "diffusion_pytorch_model-00001-of-00002"


def move_to_absent_shard(transformer: Path) -> None:
    """The index names a shard that is not there."""
    index = {"weight_map": dict.fromkeys(load_file(transformer / WEIGHTS), f"{SHARD}.safetensors")}
    (transformer / WEIGHTS).unlink()
    (transformer / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def drop_a_tensor(transformer: Path) -> None:
    tensors = load_file(transformer / WEIGHTS)
    tensors.pop("transformer_blocks.1.ff.net.2.bias")
    save_file(tensors, transformer / WEIGHTS)


def set_in_config(**changes: Any) -> Callable[[Path], None]:
    return lambda transformer: edit_json(transformer / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (
            set_in_config(use_rotary_positional_embeddings=True),
            ["use_rotary_positional_embeddings"],
        ),
        (set_in_config(num_layers=42), ["num_layers=2", "42"]),
        (move_to_absent_shard, [f"lacks the shard {SHARD}"]),
        (drop_a_tensor, ["missing (transformer.layers.1.mlp.dense_4h_to_h.bias)"]),
    ],
    ids=["rotary", "layers", "shard", "lacking"],
)
def test_damaged_diffusers_folders_are_refused(small, tmp_path, capsys, damage, fragments):
    assert small.convert(vae_ckpt_path=None) == 0
    damage(small.folder / "out" / "transformer")
    refused(capsys, hf2sat(small.folder / "out", tmp_path / "back"), *fragments)
    nothing_new(tmp_path, "small")


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("transformer", "is not a readable diffusers folder"),
        ("vae.pt", "is not a readable diffusers folder"),
        ("out/scheduler", "is not a readable diffusers folder"),
        ("empty", "is not a readable diffusers folder"),
    ],
)
def test_what_is_no_diffusers_folder_is_refused(small, tmp_path, capsys, source, fragment):
    assert small.convert(vae_ckpt_path=None) == 0
    (small.folder / "empty").mkdir()
    refused(capsys, hf2sat(small.folder / source, tmp_path / "back"), fragment)
    nothing_new(tmp_path, "small")


@pytest.mark.parametrize(
    ("target", "fragment"), [("out", "exists already"), ("vae.pt/back", "cannot be written")]
)
def test_a_target_that_cannot_be_is_refused(small, capsys, target, fragment):
    assert small.convert(vae_ckpt_path=None) == 0
    refused(capsys, hf2sat(small.folder / "out", small.folder / target), fragment)


@pytest.mark.parametrize(
    ("part", "name", "shape"),
    [
        ("transformer", "transformer_blocks.9000.norm1.norm.weight", [16]),
        ("transformer", "transformer_blocks.0.attn1.norm_q.weight", [999]),
        ("vae", "encoder.down_blocks.0.resnets.0.conv1.conv.weight", [0, 1, 1, 1, 1]),
        ("vae", "encoder.down_blocks.0.resnets.0.conv1.conv.weight", [7, 1, 1, 1, 1]),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(small, tmp_path, capsys, part, name, shape):
    assert small.convert() == 0
    folder = small.folder / "out" / part
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {name: torch.zeros(shape)}, weights)
    class_name = json.loads((folder / "config.json").read_text())["_class_name"]
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name}))  # without sizes
    refused(capsys, hf2sat(folder, tmp_path / "back"), "no CogVideoX-2B has ", str(folder))


def test_a_full_disk_leaves_nothing(small, capsys, monkeypatch):
    def fill(state: Any, path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")

    assert small.convert(vae_ckpt_path=None) == 0
    known = os.listdir(small.folder)
    monkeypatch.setattr(torch, "save", fill)
    code = hf2sat(small.folder / "out", small.folder / "back")
    refused(capsys, code, "back cannot be written", "free some space")
    nothing_new(small.folder, *known)


def test_as_a_program_it_ends_with_one_line_and_1(small):
    script = ROOT / "tools" / "convert_weight_sat2hf.py"
    command = [
        sys.executable,
        str(script),
        "--transformer_ckpt_path",
        "absent",
        "--output-path",
        "o",
    ]
    done = subprocess.run(command, cwd=small.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --transformer_ckpt_path: absent does not")
    nothing_new(small.folder, "small.yaml", "transformer", "vae.pt")
