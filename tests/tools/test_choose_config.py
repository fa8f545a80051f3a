from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tools import choose_config
from tools.choose_config import BUNDLED, FULL, weight_paths

REPOSITORY = Path(choose_config.__file__).parents[1]
PATHS = ["weights/transformer", "weights/3d-vae.pt", "weights/t5"]

CONFIG = """
args: {load: weights/transformer}
model:
  first_stage_config: {target: x, params: {ckpt_path: weights/3d-vae.pt}}
  conditioner_config: {target: x, params: {emb_models: [{params: {model_dir: weights/t5}}]}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a 2B configuration and, so far, all the weights that it names."""
    (tmp_path / "configs").mkdir()
    (tmp_path / FULL).write_text(CONFIG)
    for path in PATHS:
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_2b_model_is_chosen_where_its_weights_are(folder):
    assert choose_config.choose_config() == (FULL, [])


@pytest.mark.parametrize("path", PATHS)
def test_one_missing_path_is_enough_for_the_bundled_model(folder, path):
    (folder / path).rmdir()
    assert choose_config.choose_config() == (BUNDLED, [path])


def test_the_flag_load_wins_over_the_file(folder):
    (folder / "mine").mkdir()
    shutil.rmtree(folder / "weights" / "transformer")
    assert choose_config.choose_config("mine") == (FULL, [])
    assert choose_config.choose_config("absent") == (BUNDLED, ["absent"])


def test_what_is_missing_is_said_beside_the_choice(folder, monkeypatch, capsys):
    shutil.rmtree(folder / "weights")
    monkeypatch.setattr("sys.argv", ["choose_config.py", "--seed", "3", "--output-dir", "x"])
    choose_config.main()
    said = capsys.readouterr()
    assert said.out == f"{BUNDLED}\n"
    assert all(path in said.err for path in PATHS) and "README" in said.err


@pytest.mark.parametrize(
    "text",
    [
        "args: [",
        "- a\n- list\n",
        "",
        "args: {load: 3}",
        "model: {conditioner_config: 3}",
        "model: {conditioner_config: {params: {emb_models: 3}}}",
        "model: {conditioner_config: {params: {emb_models: [3]}}}",
    ],
)
def test_a_file_that_makes_no_sense_is_left_to_whoever_runs_it(folder, text):
    (folder / FULL).write_text(text)
    assert choose_config.choose_config() == (FULL, [])


def test_the_shipped_file_names_three_paths():
    assert len(weight_paths(OmegaConf.load(REPOSITORY / FULL))) == 3
