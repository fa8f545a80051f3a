"""The dataset that teaches a subject: its contents, and what it leaves out."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from data_video import SFTDataset
from sgm.errors import UserError
from tools.launch.choose_config import BUNDLED_TRAIN, LESSON
from tools.tiny import lesson
from tools.tiny.lesson import ASKED, COLOR, SHAPE, SUBJECT, draw_dataset, parse_prompt, prompts
from tools.tiny.measure import measure
from tools.tiny.shapes import BACKGROUNDS, DIRECTIONS, WORDINGS, ShapeClips, held_out_combinations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny_lesson"
    draw_dataset(path, num_new=3, num_known=2, num_valid=1)
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The three sets of clips in full, by the name of their folder."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson, "write_clips", lambda clips, path: found.update({path.name: clips}))
        draw_dataset(tmp_path_factory.mktemp("full") / "data")
    return found


def captions(folder, count):
    params = OmegaConf.to_container(OmegaConf.load(BUNDLED_TRAIN).data.params)
    data = SFTDataset(data_dir=str(folder), **params)
    items = [data[index] for index in range(len(data))]
    assert len(items) == count and all(item["mp4"].shape == (17, 3, 64, 96) for item in items)
    return [item["txt"] for item in items]


def test_the_dataset_is_in_the_documented_layout(folder):
    assert all(SUBJECT in caption for caption in captions(folder / "new", 3))
    assert not any(SUBJECT in caption for caption in captions(folder / "known", 2))
    assert all(SUBJECT in caption for caption in captions(folder / "valid", 1))
    assert (folder / "new" / "videos" / "0.mp4").is_file()
    assert (folder / "new" / "labels" / "0.txt").is_file()


def test_the_configuration_reads_the_folders_that_are_drawn(folder):
    args = OmegaConf.load(LESSON).args
    named = [*args.train_data, *args.valid_data]
    assert sorted(named) == sorted(f"tiny_lesson/{path.name}" for path in folder.iterdir())


@pytest.mark.parametrize("name", ["new", "valid"])
@pytest.mark.parametrize("index", range(4))
def test_clips_show_what_their_captions_say_in_the_subjects_own_word(drawn, name, index):
    frames, caption = drawn[name].draw(index)
    assert caption == drawn[name].caption(index)
    assert COLOR not in caption and SHAPE not in caption
    assert all(measure(frames).matches(parse_prompt(caption)).values())


def test_what_is_asked_for_is_kept_from_training(drawn):
    def pairs(clips):
        specs = [parse_prompt(clips.caption(index)) for index in range(len(clips))]
        return {(spec.direction, spec.background) for spec in specs}

    assert not pairs(drawn["new"]) & set(ASKED)
    assert pairs(drawn["valid"]) == set(ASKED)
    known = drawn["known"]
    specs = {parse_prompt(known.caption(index)).combination for index in range(len(known))}
    assert not specs & {spec.combination for spec in held_out_combinations()}


def test_prompts_are_sixteen_and_ask_for_every_direction_and_background():
    specs = [parse_prompt(prompt) for prompt in prompts()]
    assert len(set(prompts())) == 16 == len(ASKED) * len(WORDINGS)
    assert all(SUBJECT in prompt for prompt in prompts())
    assert {spec.direction for spec in specs} == set(DIRECTIONS)
    assert {spec.background for spec in specs} == set(BACKGROUNDS)


def test_the_subject_is_new_to_the_bundled_model():
    clips = ShapeClips(300, seed=0)
    assert not any(SUBJECT in clips.caption(index) for index in range(len(clips)))


def test_an_existing_folder_is_left_alone(folder):
    with pytest.raises(UserError, match="exists already; remove it"):
        draw_dataset(folder)
