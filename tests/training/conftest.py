"""A small model of two blocks with random weights, and clips for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import train_video
from tools import make_random_weights
from tools.tiny.draw_clips import write_clips
from tools.tiny.shapes import ShapeClips

ROOT = Path(__file__).resolve().parents[2]
LORA = {
    "not_trainable_prefixes": ["all"],
    "lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 2}},
}
CONSTANT = {"lr_decay_style": "constant", "warmup": 0.0, "auto_warmup_steps": 0}


@dataclass
class Small:
    """Configuration, weights and clips in a folder."""

    config: DictConfig
    folder: Path

    def file(self, name: str, *changes: Any) -> str:
        """Write a configuration file with changes of the common sections; returns its path."""
        path = self.folder / f"{name}.yaml"
        OmegaConf.save(OmegaConf.merge(self.config, *changes), path)
        return str(path)

    def train(self, file: str, run: Path, *flags: str) -> Path:
        """Train in this process with the runs' folder `run`; returns the run's folder."""
        train_video.main(["--base", file, "--device", "cpu", "--save", str(run), *flags])
        (found,) = run.iterdir()
        return found


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    config = OmegaConf.load(ROOT / "configs" / "cogvideox_tiny_sft.yaml")
    config.model.conditioner_config.params.emb_models[0].params.model_dir = str(folder / "t5")
    config.model.network_config.params.num_layers = 2
    config.model.first_stage_config.params.ckpt_path = str(folder / "3d-vae.pt")
    config.data.params.max_num_frames = 5
    config.deepspeed.train_micro_batch_size_per_gpu = 1
    config.args.load = str(folder / "transformer")
    config.args.train_data = [str(folder / "clips")]
    config.args.valid_data = []
    config.args.num_workers = 0
    config.args.log_interval = 1
    config.args.update(CONSTANT)
    write_clips(ShapeClips(3, seed=0), folder / "clips")
    found = Small(config, folder)
    make_random_weights.main(["--base", found.file("base"), "--t5-layers", "1"])
    return found


def module_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in the folder of an iteration."""
    path = checkpoint / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=True)["module"]
