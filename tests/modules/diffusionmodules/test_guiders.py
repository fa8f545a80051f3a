"""Guidance: batching, combination, scales."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sgm.errors import UserError
from sgm.modules.diffusionmodules.guiders import DynamicCFG, IdentityGuider, VanillaCFG


def test_combination_by_hand() -> None:
    guider = VanillaCFG(6)
    # unconditional first: 2 + 6 (3 - 2) = 8 and 0 + 6 (-1 - 0) = -6
    denoised = torch.tensor([2.0, 0.0, 3.0, -1.0]).reshape(4, 1, 1, 1, 1)
    assert guider.combine(denoised, guider.scale_at(500, 10)).flatten().tolist() == [8.0, -6.0]


def test_conditioning_is_one_batch_with_the_unconditional_half_first() -> None:
    cond, uncond = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    joined = VanillaCFG(6).prepare({"crossattn": cond}, {"crossattn": uncond})
    assert torch.equal(joined["crossattn"], torch.cat([uncond, cond]))


def test_identity_evaluates_the_conditional_branch_only() -> None:
    guider = IdentityGuider()
    cond = {"crossattn": torch.ones(2, 3, 4)}
    denoised = torch.randn(2, 1, 1, 1, 1)
    assert guider.num_branches == 1
    assert guider.prepare(cond, None) is cond
    assert guider.combine(denoised, guider.scale_at(500, 10)) is denoised


def test_dynamic_scale_by_hand() -> None:
    guider = DynamicCFG(6, 2, num_steps=100)
    # ((50 - 150) / 100)^2 = 1: cos(pi) = -1, the top, 1 + 6
    assert guider.scale_at(150, 50) == pytest.approx(7.0, abs=1e-12)
    # ((50 - 50) / 100)^2 = 0: cos(0) = 1, the bottom
    assert guider.scale_at(50, 50) == 1.0
    # ((50 - 0) / 100)^2 = 1/4: cos(pi / 4) = sqrt(1/2)
    assert guider.scale_at(0, 50) == pytest.approx(1 + 3 * (1 - math.sqrt(0.5)), abs=1e-12)
    # the run's number of steps counts as well: ((100 - 150) / 100)^2 = 1/4
    assert guider.scale_at(150, 100) == pytest.approx(1 + 3 * (1 - math.sqrt(0.5)), abs=1e-12)


def test_dynamic_scale_is_not_monotone() -> None:
    scales = [DynamicCFG(6, 5, num_steps=50).scale_at(t, 50) for t in range(999, 0, -20)]
    rises = [b > a for a, b in pairwise(scales)]
    assert any(rises) and not all(rises)
    assert min(scales) >= 1.0 and max(scales) <= 7.0


@pytest.mark.parametrize(
    "params",
    [
        {"scale": "six", "exp": 5, "num_steps": 50},
        {"scale": float("inf"), "exp": 5, "num_steps": 50},
        {"scale": 6, "exp": 2.5, "num_steps": 50},
        {"scale": 6, "exp": 0, "num_steps": 50},
        {"scale": 6, "exp": 5, "num_steps": 0},
    ],
)
def test_impossible_values_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"DynamicCFG: (scale|exp|num_steps)="):
        DynamicCFG(**params)


def test_a_missing_unconditional_conditioning_is_refused() -> None:
    cond = {"crossattn": torch.ones(2, 3, 4)}
    with pytest.raises(ValueError, match="unconditional"):
        VanillaCFG(6).prepare(cond, None)
