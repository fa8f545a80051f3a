"""Samplers: goldens, coefficients by hand, invariants, the contract with network and caller."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgm.errors import UserError
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.discretizer import ZeroSNRDDPMDiscretization

SHAPE = (2, 3, 4, 2, 2)
SAMPLERS = ["VPSDEDPMPP2MSampler", "VideoDDIMSampler"]
GUIDERS: dict[str, dict[str, Any]] = {
    "IdentityGuider": {},
    "VanillaCFG": {"scale": 6},
    "DynamicCFG": {"scale": 6, "exp": 5, "num_steps": 10},
}
GOLDENS = {
    "sampler_dpmpp_10": ("VPSDEDPMPP2MSampler", 10, "DynamicCFG", {"scale": 6, "exp": 5}, 10),
    "sampler_ddim_30": ("VideoDDIMSampler", 30, "DynamicCFG", {"scale": 6, "exp": 5}, 50),
    "sampler_dpmpp_5_vanilla": ("VPSDEDPMPP2MSampler", 5, "VanillaCFG", {"scale": 6}, None),
}


@pytest.fixture(params=SAMPLERS)
def sampler_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=GUIDERS)
def guider_node(request: pytest.FixtureRequest, make_node: Callable[..., dict]) -> dict[str, Any]:
    return make_node(f"guiders.{request.param}", **GUIDERS[request.param])


def conditionings() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"crossattn": torch.randn(2, 5, 7)}, {"crossattn": torch.randn(2, 5, 7)}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(
    name: str,
    golden: Callable[[str], dict[str, Tensor]],
    make_node: Callable[..., dict],
    make_sampler: Callable[..., Any],
    denoiser: DiscreteDenoiser,
    network: Any,
) -> None:
    sampler_name, num_steps, guider_name, guider, guider_steps = GOLDENS[name]
    if guider_steps is not None:
        guider = {**guider, "num_steps": guider_steps}
    sampler = make_sampler(sampler_name, num_steps, make_node(f"guiders.{guider_name}", **guider))
    stored = golden(name)
    steps = sampler.steps(
        network,
        denoiser,
        stored["in.x"],
        {"crossattn": stored["in.cond"]},
        {"crossattn": stored["in.uc"]},
        noise=lambda step_index: stored["in.noise"][step_index],
    )
    trajectory = [step.x for step in steps]
    assert torch.equal(sampler.schedule.timesteps, stored["out.timesteps"])
    # The golden's network got a copy of the clips for each branch of guidance.
    timesteps = torch.stack(network.timesteps).repeat(1, sampler.guider.num_branches)
    assert torch.equal(timesteps.float(), stored["out.network_t"].float())
    # The golden holds float32; ours are doubles rounded to it, so that one rounding remains.
    levels = torch.tensor(sampler.noise_levels())
    torch.testing.assert_close(levels, stored["out.alphas_cumprod_sqrt"], rtol=0, atol=1e-7)
    if "out.cfg_scale" in stored:
        scales = torch.tensor(sampler.guidance_scales())
        # The cosine's argument is about 3e10, where doubles are 4e-6 apart; times half the scale.
        torch.testing.assert_close(scales, stored["out.cfg_scale"], rtol=0, atol=2e-5)
    # Float32 steps in another order of operations: 1e-6 per step, amplified by guidance.
    torch.testing.assert_close(torch.stack(trajectory), stored["out.trajectory"], rtol=0, atol=1e-4)
    torch.testing.assert_close(trajectory[-1], stored["out.x"], rtol=0, atol=1e-4)


def test_ddim_coefficients_by_hand(
    make_node: Callable[..., dict], make_sampler: Callable[..., Any]
) -> None:
    sampler = make_sampler("VideoDDIMSampler", 2, make_node("guiders.IdentityGuider"))
    # Two levels: 0 at timestep 999, a at 499. Step 0: sqrt((1 - a^2) / 1) of x, a of the estimate;
    # step 1 goes to a next level of 1: nothing of x, all of the estimate.
    a = ZeroSNRDDPMDiscretization(3.0)(2).alphas_cumprod_sqrt[0].item()
    first, last = sampler.coefficients()
    assert first == pytest.approx((math.sqrt(1 - a * a), a, 0.0, 0.0), abs=1e-15)
    assert last == (0.0, 1.0, 0.0, 0.0)


def test_dpmpp_first_step_forgets_x_and_second_does_not_extrapolate(
    make_node: Callable[..., dict], make_sampler: Callable[..., Any]
) -> None:
    sampler = make_sampler("VPSDEDPMPP2MSampler", 4, make_node("guiders.IdentityGuider"))
    first, second, third, last = sampler.coefficients()
    a = sampler.noise_levels()
    # h is infinite from no signal: e^-h = 0, -expm1(-2h) = 1
    assert first == pytest.approx((0.0, a[1], 0.0, math.sqrt(1 - a[1] ** 2)), abs=1e-15)
    assert second.previous == 0.0
    # With m = (1 - a^2) / a^2 = e^(-2 lambda), e^(-2h) = m_next / m; r = h_last / h.
    m = [(1 - level**2) / level**2 for level in a[1:]]
    half_r = math.log(m[2] / m[1]) / math.log(m[1] / m[0]) / 2
    weight = (1 - m[2] / m[1]) * a[3]
    assert third.denoised == pytest.approx(weight * (1 + half_r), abs=1e-12)
    assert third.previous == pytest.approx(-weight * half_r, abs=1e-12)
    assert last == (0.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("num_steps", [2, 7, 50, 1000])
def test_each_step_lands_on_the_next_noise_level(
    sampler_name: str,
    num_steps: int,
    make_node: Callable[..., dict],
    make_sampler: Callable[..., Any],
) -> None:
    """With a perfect estimate, x = a clean + s noise must become the same at the next level."""
    sampler = make_sampler(sampler_name, num_steps, make_node("guiders.IdentityGuider"))
    levels = [*sampler.noise_levels(), 1.0]
    assert len(sampler.coefficients()) == num_steps
    for step, (a, a_next) in zip(sampler.coefficients(), pairwise(levels), strict=True):
        clean = step.x * a + step.denoised + step.previous
        variance = step.x**2 * (1 - a**2) + step.noise**2
        # Doubles; at the cleanest levels 1 - a^2 loses three digits.
        assert clean == pytest.approx(a_next, abs=1e-11)
        assert variance == pytest.approx(1 - a_next**2, abs=1e-11)


@pytest.mark.parametrize("num_steps", [2, 6])
def test_perfect_network_returns_the_clean_latent(
    sampler_name: str,
    guider_node: dict[str, Any],
    num_steps: int,
    make_sampler: Callable[..., Any],
    sample: Callable[..., Tensor],
    denoiser: DiscreteDenoiser,
) -> None:
    sampler = make_sampler(sampler_name, num_steps, guider_node)
    clean = torch.randn(SHAPE)
    levels = iter(sampler.noise_levels())
    table = ZeroSNRDDPMDiscretization(3.0)(1000).alphas_cumprod_sqrt

    def perfect(x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        a = table[(table - next(levels)).abs().argmin()].item()  # what the denoiser rounds to
        velocity = (a * x - clean) / math.sqrt(1 - a * a)
        return torch.cat([velocity] * sampler.guider.num_branches)

    cond, uncond = conditionings()
    x = sample(
        sampler,
        perfect,
        denoiser,
        torch.randn(SHAPE),
        cond,
        uncond,
        noise=lambda step_index: torch.randn(SHAPE),
    )
    # The last step returns the estimate: one division and two products in float32.
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


def test_one_forward_per_step_with_the_unconditional_half_first(
    sampler_name: str,
    guider_node: dict[str, Any],
    make_sampler: Callable[..., Any],
    denoiser: DiscreteDenoiser,
    network: Any,
) -> None:
    sampler = make_sampler(sampler_name, 4, guider_node)
    cond, uncond = conditionings()
    steps = list(
        sampler.steps(
            network,
            denoiser,
            torch.randn(SHAPE),
            cond,
            uncond,
            noise=lambda step_index: torch.randn(SHAPE),
        )
    )
    branches = sampler.guider.num_branches
    assert steps[-1].x.dtype == torch.float32
    assert [(step.step_index, step.x.shape) for step in steps] == [(i, SHAPE) for i in range(4)]
    assert [t.tolist() for t in network.timesteps] == [[t, t] for t in (999, 749, 499, 249)]
    assert network.timesteps[0].dtype == torch.int64
    # One conditioning object for the whole run: nothing is concatenated again per step.
    assert len({id(seen) for seen in network.conditionings}) == 1
    text = torch.cat([uncond["crossattn"], cond["crossattn"]])
    assert torch.equal(network.conditionings[0]["crossattn"], text[-2 * branches :])
    # All branches use the same latents, and the network gets one copy of them.
    for latents in network.inputs:
        assert latents.dtype == torch.float32 and latents.shape == SHAPE


def test_guided_by_scale_one_equals_identity(
    sampler_name: str,
    make_node: Callable[..., dict],
    make_sampler: Callable[..., Any],
    sample: Callable[..., Tensor],
    denoiser: DiscreteDenoiser,
    network: Any,
) -> None:
    cond, uncond = conditionings()
    start, noises = torch.randn(SHAPE), torch.randn(5, *SHAPE)
    results = [
        sample(
            make_sampler(sampler_name, 5, guider),
            *(network, denoiser, start, cond, uncond),
            noise=lambda step_index: noises[step_index],
        )
        for guider in (
            make_node("guiders.VanillaCFG", scale=1),
            make_node("guiders.IdentityGuider"),
        )
    ]
    # uncond + (cond - uncond) rounds once per step.
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "drawn"), [("VPSDEDPMPP2MSampler", [0, 1, 2]), ("VideoDDIMSampler", [])]
)
def test_noise_is_asked_for_only_where_it_is_added(
    sampler: str,
    drawn: list[int],
    make_node: Callable[..., dict],
    make_sampler: Callable[..., Any],
    sample: Callable[..., Tensor],
    denoiser: DiscreteDenoiser,
    network: Any,
) -> None:
    asked: list[int] = []

    def noise(step_index: int) -> Tensor:
        asked.append(step_index)
        return torch.randn(SHAPE)

    run = make_sampler(sampler, 4, make_node("guiders.IdentityGuider"))
    sample(run, network, denoiser, torch.randn(SHAPE), conditionings()[0], noise=noise)
    assert asked == drawn


def test_half_precision_latents_and_network_are_stepped_in_float32(
    sampler_name: str,
    make_node: Callable[..., dict],
    make_sampler: Callable[..., Any],
    denoiser: DiscreteDenoiser,
) -> None:
    seen: list[Tensor] = []
    sampler = make_sampler(sampler_name, 3, make_node("guiders.IdentityGuider"))

    def half_network(x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        seen.append(x)
        return torch.tanh(x).to(torch.bfloat16)

    steps = sampler.steps(
        half_network,
        denoiser,
        torch.randn(SHAPE, dtype=torch.float16),
        conditionings()[0],
        noise=lambda step_index: torch.randn(SHAPE, dtype=torch.float16),
    )
    seen += [step.x for step in steps]
    assert {x.dtype for x in seen} == {torch.float32}


class CopyCounter(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.num_copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.num_copies += 1
        return result


def test_host_and_device_exchange_nothing_inside_the_loop(
    sampler_name: str,
    guider_node: dict[str, Any],
    make_sampler: Callable[..., Any],
    sample: Callable[..., Tensor],
    denoiser: DiscreteDenoiser,
) -> None:
    """Reading a value of a meta tensor raises; the number of copies is the same for all steps."""
    latents = torch.empty(SHAPE, device="meta")
    empty = {"crossattn": torch.empty(2, 5, 7, device="meta")}
    copies = []
    for num_steps in (2, 3, 9):  # the first run moves the denoiser's table
        with CopyCounter() as counter:
            x = sample(
                make_sampler(sampler_name, num_steps, guider_node),
                lambda x, timesteps, cond: x * timesteps.reshape(-1, 1, 1, 1, 1),
                denoiser,
                latents,
                empty,
                empty,
                noise=lambda step_index: latents,
            )
        copies.append(counter.num_copies)
        assert x.device.type == "meta" and x.shape == SHAPE
    # Timesteps and levels, once per run.
    assert copies == [3, 2, 2]


@pytest.mark.parametrize("num_steps", [1, 0, 1001])
def test_impossible_numbers_of_steps_are_refused_when_built(
    sampler_name: str,
    num_steps: int,
    make_node: Callable[..., dict],
    make_sampler: Callable[..., Any],
) -> None:
    with pytest.raises(UserError, match=f"num_steps.*={num_steps} must be .*from 2 to 1000"):
        make_sampler(sampler_name, num_steps, make_node("guiders.IdentityGuider"))
