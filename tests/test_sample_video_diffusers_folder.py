"""The sampling command on the bundled model in diffusers' layout: the same bytes as from SAT's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Tokenizer

import sample_video
from sgm.checkpoint.diffusers_folder import PART_CLASSES
from sgm.checkpoint.table import to_diffusers
from sgm.checkpoint.transformer import read_transformer
from sgm.checkpoint.vae import load_vae_state
from sgm.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "CogVideoX-tiny-sat"


def write_part(folder: Path, tensors: Mapping[str, Tensor], part: str) -> None:
    """A part's folder with the configuration and two shards."""
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in half}, folder / shard)
        weight_map |= dict.fromkeys(half, shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"_class_name": PART_CLASSES[part]}))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a pipeline's folder."""
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    shutil.copytree(BUNDLED / "t5", folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "text_encoder" / "spiece.model").rename(folder / "tokenizer" / "spiece.model")
    _, transformer, _ = read_transformer(BUNDLED / "transformer")
    vae = load_vae_state(BUNDLED / "vae" / "3d-vae.pt")
    for part, tensors in (("transformer", transformer), ("vae", vae)):
        write_part(folder / part, to_diffusers(tensors, part, where=BUNDLED), part)
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    return folder


def sample(folder: Path, *, transformer: Path, vae: Path, t5: Path) -> bytes:
    """The video that the command makes of these weights in a few steps."""
    folder.mkdir()
    embedder = yaml.safe_load((ROOT / "configs" / "cogvideox_tiny_infer.yaml").read_text())
    embedder = embedder["model"]["conditioner_config"]["params"]["emb_models"][0]
    embedder["params"]["model_dir"] = str(t5)
    model = {
        "conditioner_config": {"params": {"emb_models": [embedder]}},
        "first_stage_config": {"params": {"ckpt_path": str(vae)}},
        "sampler_config": {"params": {"num_steps": 2}},
    }
    overlay, prompts = folder / "overlay.yaml", folder / "prompts.txt"
    overlay.write_text(yaml.safe_dump({"model": model}))
    prompts.write_text("a red circle moving left on a black background\n")
    code = run_command(
        lambda: sample_video.main(
            [
                *("--base", str(ROOT / "configs" / "cogvideox_tiny_infer.yaml"), str(overlay)),
                *("--load", str(transformer), "--input-file", str(prompts)),
                *("--sampling-num-frames", "3", "--output-dir", str(folder / "out")),
            ]
        )
    )
    assert code == 0
    (video,) = (folder / "out").rglob("*.mp4")
    return video.read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The video from the files of SAT format."""
    files = {"transformer": BUNDLED / "transformer", "vae": BUNDLED / "vae" / "3d-vae.pt"}
    return sample(tmp_path_factory.mktemp("sat") / "run", **files, t5=BUNDLED / "t5")


def test_a_pipelines_folder_gives_the_same_video(pipeline, expected, tmp_path):
    places = dict.fromkeys(("transformer", "vae", "t5"), pipeline)
    assert sample(tmp_path / "run", **places) == expected


def test_a_pipeline_that_newer_transformers_saved_gives_the_same_video(
    pipeline, expected, tmp_path
):
    tokenizer = T5Tokenizer.from_pretrained(BUNDLED / "t5")
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    assert not list(folder.rglob("spiece.model"))
    places = dict.fromkeys(("transformer", "vae", "t5"), folder)
    assert sample(tmp_path / "run", **places) == expected


def test_the_parts_folders_give_the_same_video(pipeline, expected, tmp_path):
    places = {"transformer": pipeline / "transformer", "vae": pipeline / "vae"}
    assert sample(tmp_path / "run", **places, t5=pipeline / "text_encoder") == expected
