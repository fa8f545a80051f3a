"""The loss: golden, values by hand, draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.discretizer import NoiseLevels, ZeroSNRDDPMDiscretization
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.util import instantiate_from_config

SHAPE = (4, 3, 2, 4, 4)


@pytest.fixture
def make_loss(make_node: Callable[..., dict]) -> Callable[..., VideoDiffusionLoss]:
    def make(**params: Any) -> VideoDiffusionLoss:
        discretization = make_node("discretizer.ZeroSNRDDPMDiscretization", shift_scale=3.0)
        sigma_sampler = make_node(
            "sigma_sampling.DiscreteSampling",
            uniform_sampling=True,
            num_idx=1000,
            discretization_config=discretization,
        )
        return instantiate_from_config(
            make_node("loss.VideoDiffusionLoss", sigma_sampler_config=sigma_sampler, **params)
        )

    return make


def levels_at(timesteps: list[int]) -> NoiseLevels:
    index = torch.tensor(timesteps)
    return NoiseLevels(index, ZeroSNRDDPMDiscretization(3.0)(1000).alphas_cumprod_sqrt[index])


def test_golden(
    golden: Callable[[str], dict[str, Tensor]],
    make_loss: Callable[..., VideoDiffusionLoss],
    denoiser: DiscreteDenoiser,
    network: Any,
) -> None:
    stored = golden("loss_video")
    levels = levels_at(stored["in.idx"].tolist())
    # One rounding of a double to the golden's float32.
    torch.testing.assert_close(
        levels.alphas_cumprod_sqrt.float(),
        stored["out.alphas_cumprod_sqrt_of_idx"],
        rtol=0,
        atol=1e-7,
    )
    loss = make_loss(offset_noise_level=0).at_levels(
        network,
        denoiser,
        stored["in.x"],
        {"crossattn": stored["in.cond"]},
        levels=levels,
        noise=stored["in.noise"],
    )
    # Single pass; at timestep 0 the error is divided by 1 - a^2 = 0.0025.
    torch.testing.assert_close(loss, stored["out.loss"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("timestep", [0, 400, 999])
def test_loss_is_the_squared_error_in_v(
    make_loss: Callable[..., VideoDiffusionLoss], denoiser: DiscreteDenoiser, timestep: int
) -> None:
    """Off by 0.5, 1, 1.5, 2 from the true v in each element: a loss of 0.25, 1, 2.25, 4."""
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    levels = levels_at([timestep] * 4)
    a = levels.alphas_cumprod_sqrt.float().reshape(-1, 1, 1, 1, 1)
    v = a * noise - (1 - a**2).sqrt() * x
    off = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(-1, 1, 1, 1, 1)
    loss = make_loss().at_levels(
        lambda x, timesteps, cond: v + off, denoiser, x, {}, levels=levels, noise=noise
    )
    # At timestep 0 float32 errors of 3e-7 in the estimate are divided by sqrt(1 - a^2) = 0.05.
    torch.testing.assert_close(loss, torch.tensor([0.25, 1.0, 2.25, 4.0]), rtol=0, atol=1e-4)


def test_more_texts_than_clips_are_no_training(
    make_loss: Callable[..., VideoDiffusionLoss], denoiser: DiscreteDenoiser, network: Any
) -> None:
    cond = {"crossattn": torch.randn(8, 5, 7)}
    with pytest.raises(AssertionError, match=r"\[8, .*\[4, "):
        make_loss()(network, denoiser, torch.randn(SHAPE), cond)


def test_call_draws_levels_and_noise_from_the_generator(
    make_loss: Callable[..., VideoDiffusionLoss], denoiser: DiscreteDenoiser, network: Any
) -> None:
    x, cond = torch.randn(SHAPE), {"crossattn": torch.randn(4, 5, 7)}
    losses = [
        make_loss()(network, denoiser, x, cond, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert losses[0].shape == (4,) and losses[0].dtype == torch.float32
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    timesteps = torch.stack(network.timesteps)
    assert torch.equal(timesteps[0], timesteps[1]) and not torch.equal(timesteps[0], timesteps[2])
    assert len(timesteps[0].unique()) > 1


def test_default_generator_is_used_without_one(
    make_loss: Callable[..., VideoDiffusionLoss], denoiser: DiscreteDenoiser, network: Any
) -> None:
    x, cond = torch.randn(SHAPE), {"crossattn": torch.randn(4, 5, 7)}
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(make_loss()(network, denoiser, x, cond))
    assert torch.equal(losses[0], losses[1])


def test_half_precision_latents_are_noised_in_float32(
    make_loss: Callable[..., VideoDiffusionLoss], denoiser: DiscreteDenoiser, network: Any
) -> None:
    x = torch.randn(SHAPE, dtype=torch.bfloat16)
    loss = make_loss()(network, denoiser, x, {"crossattn": torch.randn(4, 5, 7)})
    assert loss.dtype == torch.float32
    assert network.inputs[0].dtype == torch.float32


def test_gradient_reaches_the_network(
    make_loss: Callable[..., VideoDiffusionLoss], denoiser: DiscreteDenoiser
) -> None:
    weight = torch.zeros((), requires_grad=True)
    x = torch.randn(SHAPE)
    make_loss()(lambda x, timesteps, cond: weight * x, denoiser, x, {}).mean().backward()
    assert weight.grad is not None and weight.grad.abs() > 0


def test_offset_noise_is_one_value_per_sample_and_channel(
    make_loss: Callable[..., VideoDiffusionLoss],
) -> None:
    x = torch.zeros(SHAPE)
    plain, offset = (
        make_loss(offset_noise_level=level).draw_noise(
            x, generator=torch.Generator().manual_seed(0)
        )
        for level in (0, 0.5)
    )
    difference = offset - plain
    assert difference.std(dim=(1, 3, 4)).max() < 1e-6  # equal over frames and pixels
    assert difference[:, 0, :, 0, 0].unique().numel() == 8  # 4 samples of 2 channels
    # 8 values of standard deviation 0.5; a level of 0.25 or 1 would hardly give this range.
    assert 0.3 < difference[:, 0, :, 0, 0].std() < 0.8


@pytest.mark.parametrize("level", [-0.1, "a lot", float("inf"), True])
def test_impossible_offset_noise_is_refused(
    make_loss: Callable[..., VideoDiffusionLoss], level: object
) -> None:
    with pytest.raises(UserError, match="offset_noise_level"):
        make_loss(offset_noise_level=level)
