"""The measurement: right for drawn clips, also damaged ones, and None if nothing is clear."""

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image, ImageFilter

from sgm.video import write_mp4
from tools.tiny.measure import ATTRIBUTES, Measurement, measure
from tools.tiny.shapes import (
    BACKGROUNDS,
    ShapeClips,
    ShapeSpec,
    all_combinations,
    draw_clip,
    parse_caption,
)

SPEC = ShapeSpec("green", "square", "right", "gray")


def clip_of(spec, seed=0):
    return draw_clip(spec, np.random.default_rng(seed))


def blurred(video):
    blur = ImageFilter.GaussianBlur(1)
    return np.stack([np.asarray(Image.fromarray(frame).filter(blur)) for frame in video])


def noisy(video):
    noise = np.random.default_rng(0).normal(0, 10, video.shape)
    return np.clip(video + noise, 0, 255).astype(np.uint8)


def share_right(num_clips, change):
    clips = ShapeClips(num_clips, seed=11)
    right = 0
    for index in range(num_clips):
        video, caption = clips.draw(index)
        right += all(measure(change(video)).matches(parse_caption(caption)).values())
    return right / num_clips


def test_every_combination_is_measured_right():
    for index, spec in enumerate(all_combinations()):
        found = measure(clip_of(spec, seed=index))
        assert all(found.matches(spec).values()), (spec, found)


@pytest.mark.parametrize(
    "change", [blurred, noisy, lambda video: noisy(blurred(video))], ids=["blur", "noise", "both"]
)
def test_mild_damage_leaves_99_percent_right(change):
    assert share_right(100, change) >= 0.99


def test_h264_leaves_all_right(tmp_path):
    def through_file(video):
        path = tmp_path / "clip.mp4"
        write_mp4([video], path, fps=8)
        return iio.imread(path, plugin="FFMPEG")

    assert share_right(12, through_file) == 1


def test_wrong_captions_do_not_match():
    found = measure(clip_of(SPEC))
    other = ShapeSpec("cyan", "circle", "left", "white")
    assert found.matches(other) == dict.fromkeys(ATTRIBUTES, False)


def test_empty_frame_has_only_a_background():
    video = np.full((17, 64, 96, 3), BACKGROUNDS["gray"], dtype=np.uint8)
    assert measure(video) == Measurement(None, None, None, "gray")


def test_shape_that_stands_still_has_no_direction():
    video = np.repeat(clip_of(SPEC)[:1], 17, axis=0)
    assert measure(video) == Measurement("green", "square", None, "gray")


def test_diagonal_motion_has_no_direction():
    still = clip_of(SPEC)[0]
    video = np.stack([np.roll(still, (i, i), axis=(0, 1)) for i in range(8)])
    assert measure(video).direction is None


def test_two_shapes_at_once_are_no_shape():
    video = clip_of(SPEC)
    doubled = np.where(video == BACKGROUNDS["gray"], video[:, ::-1, ::-1], video)
    assert measure(doubled).shape is None


def test_shape_that_vanishes_halfway_is_no_shape():
    video = clip_of(SPEC)
    video[8:] = BACKGROUNDS["gray"]
    found = measure(video)
    assert (found.shape, found.direction) == (None, None)


def test_colors_off_the_palette_are_none():
    video = clip_of(SPEC)
    shifted = 255 - video  # magenta-like on gray; gray stays gray
    assert measure(shifted).background == "gray"
    assert measure(video // 2).background is None
