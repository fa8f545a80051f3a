"""Halving and doubling of space and time, against values worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from sgm.modules.autoencoding.resize import Downsample, Upsample, stretch_time


def frames(*values: float) -> torch.Tensor:
    """A (1, 1, t, 1, 1) video of one pixel."""
    return torch.tensor(values).reshape(1, 1, -1, 1, 1)


def identity_kernel(module: Downsample | Upsample, *, row: int, column: int) -> None:
    """Make the 3×3 convolution pick one place of its window."""
    with torch.no_grad():
        module.conv.weight.zero_()[:, :, row, column] = 1.0
        module.conv.bias.zero_()


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ((1, 2, 3), 5, (1, 2, 2, 3, 3)),
        ((1, 2, 3), 9, (1, 2, 2, 2, 2, 3, 3, 3, 3)),
        ((1, 2), 4, (1, 1, 2, 2)),
        ((1, 2), 8, (1, 1, 1, 1, 2, 2, 2, 2)),
        ((1,), 1, (1,)),
        ((1, 2, 3), 3, (1, 2, 3)),
    ],
)
def test_stretch_time(values, target, expected):
    assert stretch_time(frames(*values), target).flatten().tolist() == list(expected)


def test_stretch_time_matches_nearest_interpolation_apart_from_the_first_frame():
    x = torch.randn(2, 3, 7, 2, 2)
    rest = F.interpolate(x[:, :, 1:], size=(24, 2, 2), mode="nearest")
    assert torch.equal(stretch_time(x, 25), torch.cat([x[:, :, :1], rest], dim=2))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 2.0, 4.0, 6.0, 8.0), (1.0, 3.0, 7.0)),  # odd: the first frame alone
        ((1.0, 3.0, 5.0, 9.0), (2.0, 7.0)),
        ((5.0,), (5.0,)),
    ],
)
def test_downsample_averages_pairs_of_frames(values, expected):
    down = Downsample(1, compress_time=True)
    identity_kernel(down, row=0, column=0)
    video = frames(*values).expand(-1, -1, -1, 2, 2)  # (1, 1, t, 2, 2), the least it can halve
    assert down(video).flatten().tolist() == list(expected)


def test_downsample_leaves_time_alone_unless_asked():
    assert Downsample(2, compress_time=False)(torch.randn(1, 2, 5, 4, 4)).shape == (1, 2, 5, 2, 2)


def test_downsample_pads_right_and_bottom_only():
    down = Downsample(1, compress_time=False)
    image = torch.arange(1.0, 17.0).reshape(1, 1, 1, 4, 4)
    identity_kernel(down, row=0, column=0)  # the window's corner: every other pixel
    assert down(image).flatten().tolist() == [1.0, 3.0, 9.0, 11.0]
    identity_kernel(down, row=2, column=2)  # one beyond the image on the right and below
    assert down(image).flatten().tolist() == [11.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("expand_time", "values", "expected"),
    [
        (True, (1.0, 2.0, 3.0), (1.0, 2.0, 2.0, 3.0, 3.0)),
        (True, (1.0, 2.0), (1.0, 1.0, 2.0, 2.0)),
        (True, (4.0,), (4.0,)),
        (False, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0)),
    ],
)
def test_upsample_repeats_frames_and_pixels(expand_time, values, expected):
    up = Upsample(1, expand_time=expand_time)
    identity_kernel(up, row=1, column=1)
    result = up(frames(*values))
    assert result.shape[3:] == (2, 2)
    for row in range(2):
        for column in range(2):
            assert result[0, 0, :, row, column].tolist() == list(expected)


def test_upsample_convolves_the_enlarged_frame():
    torch.manual_seed(0)
    up = Upsample(2, expand_time=False)
    x = torch.randn(1, 2, 1, 3, 4)
    enlarged = F.interpolate(x[:, :, 0], scale_factor=2, mode="nearest")
    expected = F.conv2d(enlarged, up.conv.weight, up.conv.bias, padding=1)
    # Sums of 18 products in two orders: float32 rounding.
    torch.testing.assert_close(up(x)[:, :, 0], expected, atol=1e-6, rtol=0)
