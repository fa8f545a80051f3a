"""Noise levels: the table of 1000, few levels, bad numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgm.errors import UserError
from sgm.modules.diffusionmodules.discretizer import ZeroSNRDDPMDiscretization


def slow_levels(indices: list[int], shift_scale: float) -> list[float]:
    """The same by the definition, one level at a time in Python floats."""
    chosen, product = {}, 1.0
    for i in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
        product *= 1.0 - root**2
        chosen[i] = (product / (shift_scale + (1 - shift_scale) * product)) ** 0.5
    signal = [chosen[i] for i in indices]
    return [(s - signal[-1]) * signal[0] / (signal[0] - signal[-1]) for s in signal]


@pytest.mark.parametrize("shift_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("num_levels", "timesteps"),
    [
        (2, [499, 999]),  # 999 and 999 - 499.5, truncated
        (3, [333, 666, 999]),
        (4, [249, 499, 749, 999]),  # 999 - 249.75 k, truncated
        (1000, list(range(1000))),
    ],
)
def test_levels_equal_the_definition(
    num_levels: int, timesteps: list[int], shift_scale: float
) -> None:
    schedule = ZeroSNRDDPMDiscretization(shift_scale)(num_levels)
    assert schedule.timesteps.tolist() == timesteps
    assert schedule.timesteps.dtype == torch.int64
    assert schedule.alphas_cumprod_sqrt.dtype == torch.float64
    # Both are double precision; they differ by the order of a few operations and 1000 products.
    np.testing.assert_allclose(
        schedule.alphas_cumprod_sqrt, slow_levels(timesteps, shift_scale), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("num_levels", [2, 5, 50, 999, 1000])
def test_ends_are_no_signal_and_the_unscaled_cleanest(num_levels: int) -> None:
    schedule = ZeroSNRDDPMDiscretization(3.0)(num_levels)
    levels = schedule.alphas_cumprod_sqrt
    assert levels[-1] == 0.0
    assert schedule.timesteps[-1] == 999
    assert (levels.diff() < 0).all() and (schedule.timesteps.diff() > 0).all()
    cleanest = ZeroSNRDDPMDiscretization(3.0)._alphas_cumprod[schedule.timesteps[0]] ** 0.5
    assert levels[0].item() == pytest.approx(cleanest, abs=1e-15)


def test_first_level_by_hand() -> None:
    # alpha_0 = 1 - 0.00085 = 0.99915; shifted 0.99915 / (3 - 2 * 0.99915) = 0.99915 / 1.0017
    levels = ZeroSNRDDPMDiscretization(3.0)(1000).alphas_cumprod_sqrt
    assert levels[0].item() == pytest.approx((0.99915 / 1.0017) ** 0.5, abs=1e-12)


@pytest.mark.parametrize("num_levels", [1, 0, -3, 1001, 2.5, "50", True, None])
def test_impossible_numbers_of_levels_are_refused(num_levels: object) -> None:
    with pytest.raises(UserError, match=r"num_steps.*from 2 to 1000"):
        ZeroSNRDDPMDiscretization(3.0)(num_levels)


@pytest.mark.parametrize("shift_scale", [0, -1.0, float("nan"), "3,0"])
def test_impossible_shifts_are_refused(shift_scale: object) -> None:
    with pytest.raises(UserError, match="shift_scale"):
        ZeroSNRDDPMDiscretization(shift_scale)
