"""What tests of several folders share: a small text encoder and a small configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from arguments import SamplingArgs, parse_config
from tools.make_random_weights import write_t5

OLD_NAMES = Path(__file__).parent / "data" / "old_names.yaml"


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 folder of width 64 with random weights."""
    folder = tmp_path_factory.mktemp("small") / "t5"
    torch.manual_seed(0)
    write_t5(folder, width=64, num_layers=1)
    return folder


@pytest.fixture
def small_model(t5_folder: Path) -> dict[str, Any]:
    """The `model` section of tests/data/old_names.yaml, to be changed at will."""
    model = parse_config(SamplingArgs, "", ["--base", str(OLD_NAMES)]).model
    embedder = model["conditioner_config"]["params"]["emb_models"][0]
    embedder["params"]["model_dir"] = str(t5_folder)
    return model
