"""The whole demonstration with two training steps, few clips and few sampling steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tools import teach_tiny
from tools.tiny.lesson import draw_dataset

OVERLAY = "model: {sampler_config: {params: {num_steps: 2, verbose: false}}}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Paths of data and results, and a quick sampler."""
    (tmp_path / "quick.yaml").write_text(OVERLAY)
    quick = [*teach_tiny.SAMPLING_CONFIGS, str(tmp_path / "quick.yaml")]
    monkeypatch.setattr(teach_tiny, "SAMPLING_CONFIGS", quick)
    monkeypatch.setattr(teach_tiny, "DATA", tmp_path / "lesson")
    few = {"num_new": 3, "num_known": 1, "num_valid": 2}
    monkeypatch.setattr(teach_tiny, "draw_dataset", lambda path: draw_dataset(path, **few))
    return tmp_path


def test_it_draws_trains_renders_and_prints_further_commands(here, capsys):
    flags = ["--train-data", str(here / "lesson" / "new"), str(here / "lesson" / "known")]
    flags += ["--valid-data", str(here / "lesson" / "valid"), "--cache-dir", str(here / "cache")]
    flags += ["--save", str(here / "ckpts"), "--train-iters", "2", "--device", "cpu"]
    assert teach_tiny.main(["--prompts", "1", *flags]) == 0
    (run,) = (here / "ckpts").iterdir()
    saved = torch.load(run / "2" / "mp_rank_00_model_states.pt", weights_only=True)
    assert saved["module"] and all(".matrix_" in name for name in saved["module"])
    (folder,) = run.glob("before-after-*")
    assert (folder / "before_after.png").is_file()
    videos = {part: list((folder / part).rglob("000000.mp4")) for part in ("before", "after")}
    assert [len(paths) for paths in videos.values()] == [1, 1]
    # Two steps change the video a little.
    assert videos["before"][0].read_bytes() != videos["after"][0].read_bytes()
    said = capsys.readouterr().out
    losses = teach_tiny.validation_losses(run)
    assert len(losses) == 2 and all(0 < loss < 1 for loss in losses)
    assert f"validation loss {losses[1]:.4f}, before {losses[0]:.4f}" in said
    assert "of 1 videos" in said
    assert f"--lora {run} --input-file" in said and str(folder / "before_after.png") in said


def test_the_configurations_exist_and_train_lora_only():
    root = Path(teach_tiny.__file__).parents[1]
    files = [*teach_tiny.CONFIGS, *teach_tiny.SAMPLING_CONFIGS]
    assert all((root / name).is_file() for name in files)
    merged = OmegaConf.merge(*(OmegaConf.load(root / name) for name in teach_tiny.CONFIGS))
    assert merged.model.not_trainable_prefixes == ["all"] and merged.model.lora_config
    assert merged.args.train_data == [f"{teach_tiny.DATA}/{name}" for name in ("new", "known")]


def test_existing_data_and_other_folders_are_not_drawn(here):
    (here / "lesson").mkdir()
    for folder in (here / "lesson", here / "mine"):
        args = OmegaConf.create({"train_data": [str(folder / "new")], "valid_data": []})
        teach_tiny.prepare_data(args)
    assert list((here / "lesson").iterdir()) == []
