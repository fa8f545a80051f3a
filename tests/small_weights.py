"""Weights of a small model in SAT's layout, and the commands that convert weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sgm.checkpoint.transformer import POSITION_TABLE
from sgm.cli import run_command
from sgm.util import build_on_meta
from tests.conftest import OLD_NAMES
from tools import convert_weight_hf2sat, convert_weight_sat2hf
from tools.weights.writing import save_sat_transformer

CHECKPOINT = "1000/mp_rank_00_model_states.pt"


def sat2hf(*options: Any) -> int:
    return run_command(lambda: convert_weight_sat2hf.main([str(option) for option in options]))


def hf2sat(source: Path, target: Path, *options: Any) -> int:
    words = ["--input_path", str(source), "--output_path", str(target), *map(str, options)]
    return run_command(lambda: convert_weight_hf2sat.main(words))


def noise(node: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights of the model of a node; every tensor differs."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in build_on_meta(node).state_dict().items()
        if name != POSITION_TABLE
    }


class Small:
    """Weights of a small model in `folder`, and its configuration."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float16, **sizes: int) -> None:
        self.folder = folder
        self.sections = yaml.safe_load(OLD_NAMES.read_text())
        self.model = self.sections["model"]
        self.model["network_config"]["params"].update(sizes)
        self.config = folder / "small.yaml"
        self.transformer, self.vae = folder / "transformer", folder / "vae.pt"
        self.base = noise(self.model["network_config"], dtype)
        self.vae_state = noise(self.model["first_stage_config"], torch.float32)
        folder.mkdir(exist_ok=True)
        save_sat_transformer(self.transformer, self.base)
        torch.save({"state_dict": self.vae_state | {"loss.a": torch.ones(1)}}, self.vae)
        self.write_config()

    def write_config(self) -> None:
        self.config.write_text(yaml.safe_dump(self.sections))

    def convert(self, *options: Any, output: str = "out", **changes: Any) -> int:
        """Both parts with the configuration; `changes` replace options, None leaves one out."""
        named = {
            "base": self.config,
            "transformer_ckpt_path": self.transformer,
            "vae_ckpt_path": self.vae,
            "output_path": self.folder / output,
            **changes,
        }
        words = [w for name, v in named.items() if v is not None for w in (f"--{name}", v)]
        return sat2hf(*words, *options)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(capsys: pytest.CaptureFixture[str], code: int, *fragments: str) -> None:
    """The command ended with 1 and one sentence that has all of `fragments`."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1
    for fragment in fragments:
        assert fragment in lines[0]


def nothing_new(folder: Path, *known: str) -> None:
    assert sorted(os.listdir(folder)) == sorted(known)
