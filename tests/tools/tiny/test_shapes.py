"""The toy world: captions, held-out combinations, drawing."""

import itertools
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tools.tiny.shapes import (
    BACKGROUNDS,
    COLORS,
    HEIGHT,
    SIZES,
    SPEEDS,
    WIDTH,
    WORDINGS,
    ShapeClips,
    ShapeSpec,
    all_combinations,
    draw_clip,
    held_out_combinations,
    parse_caption,
    training_combinations,
)


def test_canonical_caption_is_the_documented_one():
    spec = ShapeSpec("red", "circle", "left", "black")
    assert spec.caption() == "a red circle moving left on a black background"
    said = ShapeSpec("red", "circle", "left", "black", size="small", speed="slowly")
    assert said.caption() == "a small red circle moving left slowly on a black background"


def test_every_caption_is_read_back_as_what_it_was_made_from():
    for combination, size, speed in itertools.product(all_combinations(), SIZES, SPEEDS):
        spec = ShapeSpec(*combination.combination, size=size, speed=speed)
        for wording in range(len(WORDINGS)):
            assert parse_caption(spec.caption(wording)) == spec


@pytest.mark.parametrize(
    "caption",
    [
        "a circle moving left on a black background",
        "a red blue circle moving left on a black background",
        "a panda plays the guitar",
    ],
)
def test_caption_without_exactly_one_of_each_attribute_is_refused(caption):
    with pytest.raises(ValueError, match="names color"):
        parse_caption(caption)


def choose_held_out():
    """The rule behind `held_out.txt`: 44 combinations, in the order of `all_combinations`.

    Combinations are shuffled with a fixed seed and taken in turn, except where one would hold out
    more than 40% of those that share a pair of attribute values (red circle, circle on gray, …).
    So every pair is still trained on, in at least 60% of its combinations.
    """
    specs = all_combinations()
    pair_sizes = Counter(pair for spec in specs for pair in pairs_of(spec))
    taken_per_pair = Counter()
    shuffled = list(specs)
    Random(4).shuffle(shuffled)
    chosen = set()
    for spec in shuffled:
        pairs = pairs_of(spec)
        if all(taken_per_pair[p] + 1 <= 0.4 * pair_sizes[p] for p in pairs):
            chosen.add(spec)
            taken_per_pair.update(pairs)
        if len(chosen) == 44:
            break
    return [spec for spec in specs if spec in chosen]


def pairs_of(spec):
    return list(itertools.combinations(spec.combination, 2))


def test_stored_held_out_list_is_what_the_rule_chooses():
    assert held_out_combinations() == choose_held_out()
    assert len(set(held_out_combinations())) == 44


def test_every_pair_of_attribute_values_is_trained_on():
    training = training_combinations()
    assert len(training) == 216 - 44
    assert not set(training) & set(held_out_combinations())

    def pairs(specs):
        return {
            (i, j, spec.combination[i], spec.combination[j])
            for spec in specs
            for i, j in itertools.combinations(range(4), 2)
        }

    assert pairs(training) == pairs(all_combinations())


def test_held_out_combinations_are_never_drawn_for_training():
    held_out = {spec.combination for spec in held_out_combinations()}
    clips = ShapeClips(3000, seed=0)
    captions = [clips.caption(index) for index in range(len(clips))]
    drawn = {parse_caption(caption).combination for caption in captions}
    assert not drawn & held_out
    assert len(drawn) == 172
    fresh = ShapeClips(1000, seed=0, held_out=True)
    assert {parse_caption(fresh.caption(i)).combination for i in range(1000)} == held_out


def test_clip_depends_on_seed_and_index_alone():
    clips = ShapeClips(8, seed=5)
    later, again = clips[7], ShapeClips(100, seed=5)[7]
    assert torch.equal(later["mp4"], again["mp4"]) and later["txt"] == again["txt"]
    assert later["txt"] == clips.caption(7)
    assert not torch.equal(later["mp4"], ShapeClips(8, seed=6)[7]["mp4"])


def test_worker_processes_draw_the_same_clips():
    clips = ShapeClips(4, seed=2)
    (batch,) = DataLoader(clips, batch_size=4, num_workers=1)
    assert batch["mp4"].shape == (4, 17, 3, 64, 96) and batch["mp4"].dtype == torch.float32
    for index in range(4):
        assert torch.equal(batch["mp4"][index], clips[index]["mp4"])
        assert batch["txt"][index] == clips[index]["txt"]


def test_values_are_those_of_the_drawing_in_minus_one_to_one():
    clips = ShapeClips(1, seed=0)
    drawn = torch.from_numpy(clips.draw(0)[0]).permute(0, 3, 1, 2)
    # float32 of byte / 127.5 - 1 is off by its rounding, 1e-7.
    torch.testing.assert_close(clips[0]["mp4"], drawn / 127.5 - 1, atol=1e-6, rtol=0)


def test_index_beyond_the_last_clip_is_refused():
    with pytest.raises(IndexError):
        ShapeClips(3, seed=0)[3]


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
@pytest.mark.parametrize("direction", ["left", "up"])
def test_largest_and_quickest_shapes_stay_inside_the_frame(shape, direction):
    spec = ShapeSpec("red", shape, direction, "white", size="large", speed="quickly")
    rng = np.random.default_rng(0)
    for _ in range(20):
        clip = draw_clip(spec, rng)
        border = np.ones((HEIGHT, WIDTH), dtype=bool)
        border[1:-1, 1:-1] = False
        # A triangle's acute corner may leave a faint fringe there, a quarter at most.
        fringe = np.abs(clip[:, border].astype(int) - BACKGROUNDS["white"])
        assert fringe.max() < 0.25 * np.ptp([BACKGROUNDS["white"], COLORS["red"]], axis=0).max()
        areas = (clip == COLORS["red"]).all(axis=3).sum(axis=(1, 2))
        assert areas.min() > 0.7 * 19.5**2 * 2.4  # whole in every frame


def test_motion_is_smooth_below_a_pixel():
    spec = ShapeSpec("blue", "circle", "right", "black", speed="slowly")
    clip = draw_clip(spec, np.random.default_rng(1)).astype(float)
    light = clip[..., 2] - BACKGROUNDS["black"][2]
    center = (light.sum(axis=1) @ (np.arange(WIDTH) + 0.5)) / light.sum(axis=(1, 2))
    steps = np.diff(center)
    assert 0.4 <= steps.mean() <= 0.55
    # A jump to whole pixels would differ by 0.1 and more from the mean step.
    assert np.abs(steps - steps.mean()).max() < 0.03
