from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.launch import choose_config
from tools.launch.choose_config import (
    BUNDLED,
    BUNDLED_TRAIN,
    FULL,
    FULL_TRAIN,
    LESSON,
    named_paths,
)

REPOSITORY = Path(choose_config.__file__).parents[2]
PATHS = ["weights/transformer", "weights/3d-vae.pt", "weights/t5"]

T5 = "{target: sgm.modules.encoders.modules.FrozenT5Embedder, params: {model_dir: weights/t5}}"
CONFIG = f"""
args: {{load: weights/transformer}}
model:
  first_stage_config: {{target: x, params: {{ckpt_path: weights/3d-vae.pt}}}}
  conditioner_config: {{target: x, params: {{emb_models: [{T5}]}}}}
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


@pytest.mark.parametrize(
    "flags",
    [
        ["--load", "absent"],
        ["--load", "~nouser/absent"],
        ["--load", "absent" * 50],
        ["--train", "--train-data", "weights", "absent"],
    ],
)
def test_a_path_that_a_flag_names_must_exist(folder, monkeypatch, capsys, flags):
    monkeypatch.setattr("sys.argv", ["choose_config.py", *flags])
    with pytest.raises(SystemExit, match="^error: --[a-z-]+ .*absent does not exist"):
        choose_config.main()
    assert capsys.readouterr() == ("", "")


def test_training_needs_the_data_as_well(folder):
    training = CONFIG.replace("{load:", "{train_data: [clips, more], load:")
    (folder / FULL_TRAIN).write_text(training)
    (folder / "clips").mkdir()
    choose = choose_config.choose_config
    assert choose(train=True) == (LESSON, ["more"])
    assert choose(train=True, train_data=["clips"]) == (FULL_TRAIN, [])
    assert choose() == (FULL, [])
    shutil.rmtree(folder / "weights" / "t5")
    assert choose(train=True) == (LESSON, ["weights/t5", "more"])
    # The bundled model takes the data that is given.
    assert choose(train=True, train_data=["clips"]) == (BUNDLED_TRAIN, ["weights/t5"])


def test_the_flags_of_training_are_understood(folder, monkeypatch, capsys):
    (folder / FULL_TRAIN).write_text(CONFIG)
    (folder / "clips").mkdir()
    shutil.rmtree(folder / "weights" / "t5")
    argv = ["choose_config.py", "--train", "--train-data", "clips", "--lr", "3"]
    monkeypatch.setattr("sys.argv", argv)
    choose_config.main()
    said = capsys.readouterr()
    assert said.out == f"{BUNDLED_TRAIN}\n"
    assert FULL_TRAIN in said.err and "weights/t5" in said.err and "clips" not in said.err


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
    (folder / FULL_TRAIN).write_text(text)
    assert choose_config.choose_config(train=True) == (FULL_TRAIN, [])


@pytest.mark.parametrize("name", [FULL, FULL_TRAIN])
def test_the_shipped_files_name_three_paths_and_data_for_training(name):
    path = str(REPOSITORY / name)
    assert len(named_paths(path, {})) == 3
    train = name == FULL_TRAIN
    assert len(named_paths(path, {}, train=train)) == 3 + train
