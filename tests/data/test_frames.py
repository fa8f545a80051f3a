"""Which frames of a clip an item has, compared with results by hand."""

import numpy as np
import pytest

from sgm.data.frames import ClipError, ClipFacts, FrameSettings, count_at_rate, nearest_frames


def settings(max_num_frames=49, skip=0):
    return FrameSettings((64, 96), fps=8, max_num_frames=max_num_frames, skip_frms_num=skip)


def test_frames_of_a_varying_rate_are_chosen_by_their_own_times():
    starts = np.array([0.0, 0.1, 0.2, 1.0, 1.1])
    assert count_at_rate(starts, fps=4) == 5  # 0, 0.25, 0.5, 0.75, 1.0
    assert nearest_frames(starts, np.arange(5) / 4).tolist() == [0, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("frames", "rate", "count"),
    [
        (49, 8, 49),
        (48, 8, 48),
        (142, 24000 / 1001, 48),  # 141 · 1001/24000 · 8 = 47.05: frames 0 … 47
        (181, 29.97, 49),  # 180 / 29.97 · 8 = 48.05
        (180, 30, 48),  # 179 / 30 · 8 = 47.7
        (361, 60, 49),
        (1, 30, 1),
        (0, 30, 0),
    ],
)
def test_a_clip_gives_as_many_frames_as_fit_between_its_first_and_last(frames, rate, count):
    assert count_at_rate(np.arange(frames) / rate, fps=8) == count


def test_float32_timestamps_do_not_cost_a_frame():
    starts = (np.arange(3600 * 8, 3600 * 8 + 49) / 8).astype(np.float32).astype(np.float64)
    thirds = (np.arange(3600 * 24, 3600 * 24 + 145) / 24).astype(np.float32).astype(np.float64)
    assert count_at_rate(starts, fps=8) == count_at_rate(thirds, fps=8) == 49


@pytest.mark.parametrize(
    ("count", "most", "length"), [(49, 49, 49), (48, 49, 45), (5, 49, 5), (99, 9, 9), (3, 1, 1)]
)
def test_items_have_the_longest_length_that_the_autoencoder_takes(count, most, length):
    assert settings(most).item_length(count) == length
    assert ClipFacts(99, 64, 96, 8.0, count, length).num_windows == count - length + 1


def test_less_than_two_latent_frames_are_too_few():
    with pytest.raises(ClipError, match="4 frames at 8 fps after dropping 3 at each end; 5 are"):
        settings(skip=3).item_length(4)
