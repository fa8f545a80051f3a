"""The denoiser: v-prediction, rounding to its table, what the network is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.denoiser_scaling import VideoScaling
from sgm.modules.diffusionmodules.denoiser_weighting import EpsWeighting
from sgm.modules.diffusionmodules.discretizer import ZeroSNRDDPMDiscretization
from sgm.util import instantiate_from_config

SHAPE = (2, 3, 4, 2, 2)


def test_scaling_by_hand() -> None:
    # a = 0.6: sqrt(1 - 0.36) = 0.8; without signal only the network counts, negated
    c_skip, c_out = VideoScaling()(torch.tensor([0.6, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(c_skip, torch.tensor([0.6, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(c_out, torch.tensor([-0.8, -1.0, 0.0], dtype=torch.float64))


def test_weighting_by_hand() -> None:
    # 0.36 / 0.64
    weights = EpsWeighting()(torch.tensor([0.6, 0.0], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.5625, 0.0], dtype=torch.float64))


def test_true_v_gives_back_the_clean_latent(denoiser: DiscreteDenoiser) -> None:
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    schedule = ZeroSNRDDPMDiscretization(3.0)(1000)
    timesteps = torch.tensor([17, 700])
    level = schedule.alphas_cumprod_sqrt[timesteps]
    a = level.float().reshape(-1, 1, 1, 1, 1)
    s = (1 - a**2).sqrt()

    def network(x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return a * noise - s * clean

    denoised = denoiser(network, a * clean + s * noise, timesteps, {}, alpha_cumprod_sqrt=level)
    # Three float32 products of values up to about 4.
    torch.testing.assert_close(denoised, clean, rtol=0, atol=2e-6)


def test_level_is_rounded_to_the_table_but_the_timestep_is_not(denoiser: DiscreteDenoiser) -> None:
    table = ZeroSNRDDPMDiscretization(3.0)(1000).alphas_cumprod_sqrt
    near = table[300] * 0.9 + table[301] * 0.1  # between two entries, closer to the first
    x = torch.randn(SHAPE)
    seen: list[Tensor] = []

    def network(x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        seen.append(timesteps)
        return torch.zeros_like(x)

    denoised = denoiser(network, x, torch.tensor([250, 250]), {}, alpha_cumprod_sqrt=near.expand(2))
    assert torch.equal(denoised, x * table[300].float())
    assert seen[0].tolist() == [250, 250]


def test_branches_of_guidance_are_of_the_same_noisy_clips(denoiser: DiscreteDenoiser) -> None:
    x, answers = torch.randn(SHAPE), torch.randn(3, *SHAPE)
    levels = ZeroSNRDDPMDiscretization(3.0)(1000).alphas_cumprod_sqrt[[17, 700]]

    def denoise(answer: Tensor) -> Tensor:
        timesteps = torch.tensor([17, 700])
        return denoiser(lambda *_: answer, x, timesteps, {}, alpha_cumprod_sqrt=levels)

    found = denoise(answers.flatten(0, 1))
    assert torch.equal(found, torch.cat([denoise(answer) for answer in answers]))


def test_half_precision_answer_is_combined_in_float32(denoiser: DiscreteDenoiser) -> None:
    x = torch.randn(SHAPE)
    level = torch.full((2,), 0.9, dtype=torch.float64)
    answer = torch.randn(SHAPE).to(torch.float16)
    denoised = denoiser(
        lambda x, timesteps, cond: answer, x, torch.tensor([5, 5]), {}, alpha_cumprod_sqrt=level
    )
    expected = denoiser(
        lambda x, timesteps, cond: answer.float(),
        x,
        torch.tensor([5, 5]),
        {},
        alpha_cumprod_sqrt=level,
    )
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, expected)


def test_quantized_time_is_refused(make_node: Callable[..., dict[str, Any]]) -> None:
    config = make_node(
        "denoiser.DiscreteDenoiser",
        num_idx=1000,
        quantize_c_noise=True,
        weighting_config=make_node("denoiser_weighting.EpsWeighting"),
        scaling_config=make_node("denoiser_scaling.VideoScaling"),
        discretization_config=make_node("discretizer.ZeroSNRDDPMDiscretization", shift_scale=3.0),
    )
    with pytest.raises(UserError, match="quantize_c_noise"):
        instantiate_from_config(config)
