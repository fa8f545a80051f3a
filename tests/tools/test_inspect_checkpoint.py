"""The inspection command on every kind of file and folder, and on what only looks like one."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Tokenizer

from sgm.checkpoint.table import to_diffusers
from sgm.checkpoint.transformer import MODEL_PREFIX, fingerprint, read_transformer
from sgm.checkpoint.vae import load_vae_state
from sgm.cli import run_command
from tools import inspect_checkpoint
from tools.weights.sizes import weights_of

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "CogVideoX-tiny-sat"
TINY = "configs/cogvideox_tiny_infer.yaml"


@pytest.fixture
def inspect_all(
    capsys: pytest.CaptureFixture[str],
) -> Callable[[Path], tuple[int, list[dict[str, str]]]]:
    """Runs the command; returns its exit code and what it shows of each part, by name."""

    def run(path: Path) -> tuple[int, list[dict[str, str]]]:
        code = run_command(lambda: inspect_checkpoint.main([str(path)]))
        captured = capsys.readouterr()
        parts = []
        for block in captured.out.split("\n\n"):
            parts.append({"error": captured.err})
            for line in block.splitlines():
                name, _, value = line.partition("  ")
                parts[-1][name] = value.strip()
        return code, parts

    return run


@pytest.fixture
def inspect(inspect_all: Callable[..., Any]) -> Callable[[Path], tuple[int, dict[str, str]]]:
    """As `inspect_all`, for what has no parts."""

    def run(path: Path) -> tuple[int, dict[str, str]]:
        code, (shown,) = inspect_all(path)
        return code, shown

    return run


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    """The bundled transformer's tensors under SAT's names."""
    return dict(read_transformer(WEIGHTS / "transformer")[1])


def save_sat(folder: Path, tensors: dict[str, Tensor], **beside: Any) -> Path:
    (folder / "1").mkdir(parents=True)
    module = {MODEL_PREFIX + name: tensor for name, tensor in tensors.items()}
    torch.save({"module": module, **beside}, folder / "1" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("1")
    return folder


def save_zeros(shapes: dict[str, Tensor], path: Path) -> None:
    """A safetensors file of zeros, which takes no place on a disk: it is a single hole."""
    header, end = {}, 0
    for name, tensor in shapes.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def lora_matrices(width: int = 192, rank: int = 4) -> dict[str, Tensor]:
    matrices = {}
    for layer in range(8):
        for part, num_pairs in {"query_key_value": 3, "dense": 1}.items():
            for i in range(num_pairs):
                name = f"transformer.layers.{layer}.attention.{part}.matrix"
                matrices[f"{name}_A.{i}"] = torch.ones(rank, width)
                matrices[f"{name}_B.{i}"] = torch.ones(width, rank)
    return matrices


def test_published_folder(inspect_all: Callable[..., Any]) -> None:
    code, (whole, transformer, vae, t5) = inspect_all(WEIGHTS)
    assert code == 0
    assert whole["what"] == "whole model in SAT's layout"
    assert transformer["num_layers"] == "8" and transformer["num_attention_heads"] == "6"
    assert "VAE" in vae["what"] and "T5" in t5["what"]
    assert all(part["will load"] == f"yes, with {TINY}" for part in (transformer, vae, t5))


def test_sat_transformer(inspect: Callable[..., Any]) -> None:
    code, shown = inspect(WEIGHTS / "transformer")
    assert code == 0
    assert shown["path"].endswith("mp_rank_00_model_states.pt")
    assert shown["what"] == "transformer in SAT format"
    assert "biases and norms" in shown["family"]
    assert (shown["num_layers"], shown["num_attention_heads"]) == ("8", "6")
    assert shown["attention_head_dim"] == "32"
    assert (shown["parameters"], shown["dtype"]) == ("6.07 M, 12.1 MB", "float16")
    assert (shown["missing"], shown["unknown"]) == ("nothing", "nothing")
    assert shown["will load"] == f"yes, with {TINY}"


def test_run_with_training_state(
    inspect: Callable[..., Any], base: dict[str, Tensor], tmp_path: Path
) -> None:
    # As DeepSpeed of older runs writes it, with an entry for the optimizer beside the weights.
    folder = save_sat(tmp_path / "run", base, optimizer=None, lora=None)
    state = folder / "1" / "training_state.pt"
    torch.save({"step": 7, "optimizer": {}, "schedule": {}}, state)
    code, shown = inspect(folder)
    assert code == 0
    assert shown["path"] == str(folder / "1" / "mp_rank_00_model_states.pt")
    code, shown = inspect(state)
    assert code == 1
    assert "training state" in shown["error"]


def test_whole_engine(inspect: Callable[..., Any], base: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in base.items()}
    vae = load_vae_state(WEIGHTS / "vae" / "3d-vae.pt")
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    path = tmp_path / "engine.pt"
    torch.save({"module": tensors}, path)
    code, shown = inspect(path)
    assert code == 0
    assert shown["also contains"] == "an autoencoder"
    assert shown["will load"] == f"yes, with {TINY}"


def test_shallower_model_needs_its_own_configuration(
    inspect: Callable[..., Any], base: dict[str, Tensor], tmp_path: Path
) -> None:
    # No other number in a name is above 2.
    few = {n: t for n, t in base.items() if not any(f".{i}" in n for i in (5, 6, 7))}
    code, shown = inspect(save_sat(tmp_path / "run", few))
    assert code == 0
    assert shown["num_layers"] == "5"
    assert "no file in configs/ has them" in shown["will load"]


def test_missing_and_unknown_weights_are_named(
    inspect: Callable[..., Any], base: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = dict(base)
    del tensors["transformer.layers.3.mlp.dense_h_to_4h.bias"]
    tensors["mixins.unheard.of"] = torch.zeros(1)
    code, shown = inspect(save_sat(tmp_path / "run", tensors))
    assert code == 1
    assert shown["missing"] == "transformer.layers.3.mlp.dense_h_to_4h.bias"
    assert shown["unknown"] == "mixins.unheard.of"
    assert shown["will load"].startswith("no: ")


def test_weights_of_5b_do_not_load(inspect: Callable[..., Any], tmp_path: Path) -> None:
    sizes = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64}
    sizes |= {"in_channels": 16, "out_channels": 16, "patch_size": 2}
    sizes |= {"text_embed_dim": 4096, "time_embed_dim": 512}
    shapes = weights_of(sizes, "transformer", where="")
    (tmp_path / "1").mkdir()
    (tmp_path / "latest").write_text("1")
    save_zeros(shapes, tmp_path / "1" / "mp_rank_00_model_states.safetensors")
    code, shown = inspect(tmp_path)
    assert code == 1
    assert shown["num_layers"] == "42"
    assert "CogVideoX-5B" in shown["will load"]


@pytest.mark.parametrize("name", ["vae", "vae/3d-vae.pt"])
def test_vae(inspect: Callable[..., Any], name: str) -> None:
    code, shown = inspect(WEIGHTS / name)
    assert code == 0
    assert load_vae_state(WEIGHTS / name)
    assert shown["block_out_channels"] == "[32, 32, 64, 64]"
    assert shown["latent_channels"] == "8"
    assert shown["will load"] == f"yes, with {TINY}"


@pytest.fixture(scope="module")
def diffusers_folder(base: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a diffusers pipeline, its transformer in two shards."""
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    for name, content in {
        "model_index.json": {"_class_name": "CogVideoXPipeline"},
        "transformer/config.json": {"_class_name": "CogVideoXTransformer3DModel"},
        "vae/config.json": {"_class_name": "AutoencoderKLCogVideoX"},
        "scheduler/scheduler_config.json": {"_class_name": "CogVideoXDDIMScheduler"},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    transformer = to_diffusers(base, "transformer", where="")
    shards: dict[str, dict[str, Tensor]] = {"first.safetensors": {}, "second.safetensors": {}}
    for i, name in enumerate(transformer):
        shards[list(shards)[i % 2]][name] = transformer[name].contiguous().clone()
    for name, tensors in shards.items():
        save_file(tensors, folder / "transformer" / name)
    index = {"weight_map": {n: shard for shard, tensors in shards.items() for n in tensors}}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / "transformer" / name).write_text(json.dumps(index))
    vae = to_diffusers(load_vae_state(WEIGHTS / "vae" / "3d-vae.pt"), "vae", where="")
    tensors = {name: vae[name].contiguous().clone() for name in vae}
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(WEIGHTS / "t5", folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    os.replace(folder / "text_encoder" / "spiece.model", folder / "tokenizer" / "spiece.model")
    return folder


def test_diffusers_pipeline(inspect_all: Callable[..., Any], diffusers_folder: Path) -> None:
    code, (whole, transformer, vae, t5) = inspect_all(diffusers_folder)
    assert code == 0
    assert whole["what"] == "diffusers pipeline"
    assert transformer["what"] == "transformer in diffusers format"
    assert transformer["num_layers"] == "8"
    assert "VAE" in vae["what"] and "T5" in t5["what"]
    assert all(part["will load"] == f"yes, with {TINY}" for part in (transformer, vae, t5))


def test_parts_of_diffusers(inspect: Callable[..., Any], diffusers_folder: Path) -> None:
    code, shown = inspect(diffusers_folder / "transformer")
    assert code == 0
    assert shown["what"] == "transformer in diffusers format"
    assert (shown["num_layers"], shown["will load"]) == ("8", f"yes, with {TINY}")
    code, shown = inspect(diffusers_folder / "vae")
    assert code == 0
    assert shown["what"] == "video autoencoder (VAE) in diffusers format"
    # A file of such a folder: its folder is what can be loaded.
    code, shown = inspect(diffusers_folder / "transformer" / "first.safetensors")
    assert code == 1
    assert "or a diffusers folder" in shown["error"]


def test_pipeline_without_some_parts(
    inspect_all: Callable[..., Any], diffusers_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(diffusers_folder, folder)
    for part in ("vae", "tokenizer", "text_encoder"):
        shutil.rmtree(folder / part)
    code, (_, _, vae, _) = inspect_all(folder)
    assert code == 1 and vae["what"] == "not usable"  # the index says that it has them
    index = {key: [None, None] for key in ("vae", "tokenizer", "text_encoder")}
    text = json.dumps({"_class_name": "CogVideoXPipeline", **index})
    (folder / "model_index.json").write_text(text)
    code, (_, transformer) = inspect_all(folder)
    assert code == 0
    assert transformer["will load"] == f"yes, with {TINY}"


def test_pipeline_with_a_missing_shard(
    inspect_all: Callable[..., Any], diffusers_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(diffusers_folder, folder)
    (folder / "transformer" / "second.safetensors").unlink()
    code, (_, transformer, vae, _) = inspect_all(folder)
    assert code == 1
    assert "second.safetensors" in transformer["will load"]
    assert vae["what"].startswith("video autoencoder")


@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json", "of another model"])
def test_text_encoder(inspect: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(WEIGHTS / "t5", tmp_path / "t5")
    if kind == "tokenizer.json":
        T5Tokenizer.from_pretrained(folder).save_pretrained(folder)
    if kind != "spiece.model":
        (folder / "spiece.model").unlink()
    if kind == "of another model":
        (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
        code, shown = inspect(folder)
        assert code == 1 and "tokenizer.json" in shown["error"]
        return
    code, shown = inspect(folder)
    assert code == 0
    assert shown["what"] == "T5 text encoder" and shown["num_layers"] == "3"
    assert shown["will load"] == f"yes, with {TINY}"


def test_sat_lora(inspect: Callable[..., Any], base: dict[str, Tensor], tmp_path: Path) -> None:
    record = {"r": 4, "lora_alpha": 8.0, "layer_range": list(range(8)), "base": fingerprint(base)}
    code, shown = inspect(save_sat(tmp_path / "run", lora_matrices(), lora=record))
    assert code == 0
    assert shown["what"] == "LoRA in SAT format"
    assert (shown["rank"], shown["layers"], shown["width"]) == ("4", "16", "192")
    assert shown["alpha"] == "8"
    assert shown["base model"] == fingerprint(base)
    assert shown["will load"] == f"yes, with {TINY}"


def test_lora_of_another_width_fits_no_configuration(
    inspect: Callable[..., Any], tmp_path: Path
) -> None:
    code, shown = inspect(save_sat(tmp_path / "run", lora_matrices(width=320)))
    assert code == 0
    assert shown["alpha"] == "unknown, so 1 is used"
    assert "no file in configs/" in shown["will load"]


@pytest.mark.parametrize("place", ["pytorch_lora_weights.safetensors", "."])
def test_lora_of_diffusers(inspect: Callable[..., Any], tmp_path: Path, place: str) -> None:
    tensors = to_diffusers(lora_matrices(), "lora", where="")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"transformer.{name}": tensors[name].contiguous() for name in tensors}, path)
    code, shown = inspect(tmp_path / place)
    assert code == 0
    assert shown["what"] == "LoRA in diffusers or peft format"
    assert (shown["rank"], shown["alpha"]) == ("4", "4")
    assert shown["will load"] == f"yes, with {TINY}"


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_lora_that_sat_cannot_hold(inspect: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    tensors = to_diffusers(lora_matrices(), "lora", where="")
    tensors = {name: tensors[name].contiguous() for name in tensors}
    block = "transformer_blocks.0"
    if kind == "DoRA":
        tensors[f"{block}.attn1.to_q.lora_magnitude_vector"] = torch.ones(192)
    else:
        tensors[f"{block}.ff.net.0.proj.lora_A.weight"] = torch.ones(4, 192)
        tensors[f"{block}.ff.net.0.proj.lora_B.weight"] = torch.ones(768, 4)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    code, shown = inspect(tmp_path)
    assert code == 1
    assert ("lora_magnitude_vector" if kind == "DoRA" else "ff.net.0.proj") in shown["error"]
    assert "merge it in diffusers" in shown["error"]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_file_is_not_run(inspect: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"module": {"a": torch.zeros(1)}, "evil": Evil(tmp_path / "ran")}, path)
    code, shown = inspect(path)
    assert code == 1
    assert "pickled code" in shown["error"]
    assert not (tmp_path / "ran").exists()


def truncated() -> bytes:
    return (WEIGHTS / "vae" / "3d-vae.pt").read_bytes()[:50_000]


def zip_of_text() -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("läs.txt", "hello")
        return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>quota exceeded</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a weight file"),
        (b"GGUF\x03" + bytes(100), "not a weight file"),
        ("args:\n  load: weights # 配置\n".encode(), "cannot be read as weights"),
        (bytes(range(256)) * 20, "not"),
        (struct.pack("<Q", 1 << 40) + b'{"a":', "not a whole safetensors file"),
        (truncated(), "not a whole file"),
        (zip_of_text(), "zip archive of something else"),
        (zip_of_text().replace("läs".encode(), b"l\xff\xffs"), "not a whole file"),
    ],
)
def test_another_kind_of_file_is_named(
    inspect: Callable[..., Any], tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    code, shown = inspect(path)
    assert code == 1
    assert said in shown["error"] and str(path) in shown["error"]
    assert shown["error"].count("\n") == 1


@pytest.mark.parametrize(
    "names",
    [
        ["unet.down.weight"],
        ["transformer.layers.999999999.x.weight", "mixins.y"],
        ["transformer.layers.9999.input_layernorm.weight"],
        ["transformer.layers.0.attention.query_key_value.matrix_A.0"],
        ["encoder.down.0.block.0.conv1.conv.weight"],
        ["shared.weight"],
        ["transformer_blocks.0.norm1.norm.weight"],
        ["encoder.down_blocks.0.resnets.0.conv1.conv.weight"],
        ["lora_te1_text_model.lora_down.weight"],
    ],
)
def test_odd_names_end_in_a_sentence(
    inspect: Callable[..., Any], tmp_path: Path, names: list[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: torch.zeros(2, 3) for name in names}, path)
    code, shown = inspect(path)
    assert code == 1
    assert shown["error"].startswith("error: ") or shown["will load"].startswith("no: ")


def test_names_cannot_command_the_terminal(inspect: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"mixins.\x1b[2J": torch.zeros(2)}, path)
    code, shown = inspect(path)
    assert code == 1
    assert "\\x1b[2J" in shown["unknown"] and "\x1b" not in shown["unknown"]


def test_folders_of_something_else(inspect: Callable[..., Any], tmp_path: Path) -> None:
    code, shown = inspect(tmp_path)
    assert code == 1 and "it contains nothing" in shown["error"]
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    code, shown = inspect(tmp_path)
    assert code == 1 and "FluxTransformer2DModel" in shown["error"]
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    code, shown = inspect(tmp_path)
    assert code == 1 and "FluxPipeline" in shown["error"]
    code, shown = inspect(tmp_path / "nowhere")
    assert code == 1 and "does not exist" in shown["error"]


def test_a_wrong_flag_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        inspect_checkpoint.main(["--nonsense", "x"])
    assert caught.value.code == 2
