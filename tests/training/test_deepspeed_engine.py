"""DeepSpeed's engine: groups of weights, the learning rate, skipped steps, fused checks."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from sgm.config import TrainingArgs
from sgm.sat_runtime import ensure_process_groups
from sgm.training import deepspeed_engine
from sgm.training.deepspeed_engine import (
    StepGuard,
    build_schedule,
    fuse_gradient_checks,
    parameter_groups,
)


def test_biases_and_norms_have_no_weight_decay_and_frozen_weights_no_group():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    net[2].requires_grad_(False)
    groups = parameter_groups(net)
    decayed = [w for g in groups if g.get("weight_decay") != 0.0 for w in g["params"]]
    others = [w for g in groups if g.get("weight_decay") == 0.0 for w in g["params"]]
    assert [id(w) for w in decayed] == [id(net[0].weight)]
    assert {id(w) for w in others} == {id(net[0].bias), id(net[1].weight), id(net[1].bias)}


def test_large_groups_are_divided_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(deepspeed_engine, "GROUP_ELEMENTS", 10)
    net = nn.Sequential(*(nn.Linear(3, 2, bias=False) for _ in range(3)))  # 6 elements each
    groups = parameter_groups(net)
    assert [len(group["params"]) for group in groups] == [1, 1, 1]
    assert all(group["lr"] == 1.0 for group in groups)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_skipped_step_changes_neither_weights_nor_moments(foreach):
    weight = nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], lr=0.1, foreach=foreach)
    guard = StepGuard(adam)
    weight.grad = torch.ones(3)
    adam.step()
    before = weight.detach().clone(), adam.state[weight]["exp_avg"].clone()
    weight.grad = torch.full((3,), torch.nan)
    guard.void = True
    adam.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(adam.state[weight]["exp_avg"], before[1])
    guard.void = False
    weight.grad = torch.ones(3)
    adam.step()
    assert not torch.equal(weight, before[0])


def rates(steps, **args):
    """Learning rates of the first `steps` optimizer steps, at most 1.0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, TrainingArgs(**args), learning_rate=1.0)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_it_rises_over_the_warm_up_and_falls_in_a_line():
    found = rates(10, train_iters=10, warmup=0.2, auto_warmup_steps=0)
    # Steps 1 and 2 of 10 are the warm-up: n/2; then 1 - (n - 2)/10.
    assert found == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_the_first_steps_take_5_percent_at_most():
    found = rates(4, train_iters=100, warmup=0.0, auto_warmup_steps=2, lr_decay_style="constant")
    assert found == pytest.approx([0.05, 0.05, 1.0, 1.0])


def test_a_cosine_ends_at_its_ratio():
    style = {"lr_decay_style": "cosine", "lr_decay_ratio": 0.1, "auto_warmup_steps": 0}
    found = rates(9, train_iters=99, lr_decay_iters=4, warmup=0.0, **style)
    # 0.1 + 0.9 (1 + cos(π n/4))/2 for n = 1 … 4, then constant.
    assert found[:4] == pytest.approx([0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert found[4:] == pytest.approx([0.1] * 5)


@pytest.mark.parametrize("stage", [1, 2])
def test_norm_and_overflow_are_those_of_deepspeed(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    ensure_process_groups()
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.manual_seed(0)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.0}},
    }
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=settings
    )
    optimizer = engine.optimizer
    x = torch.randn(4, 5, dtype=torch.bfloat16)

    def step(factor: float) -> tuple[float, bool]:
        engine.backward((engine(x) * factor).sum())
        engine.step()
        return float(optimizer._global_grad_norm), optimizer.overflow

    expected = [step(factor) for factor in (1.0, float("inf"))]
    fuse_gradient_checks(optimizer)
    sums = []
    square_sum = deepspeed_engine._square_sum
    monkeypatch.setattr(
        deepspeed_engine, "_square_sum", lambda *a: (sums.append(a), square_sum(*a))[1]
    )
    found = [step(factor) for factor in (1.0, float("inf"))]
    assert [overflow for _, overflow in found] == [False, True]
    assert [overflow for _, overflow in expected] == [False, True]
    assert found[0][0] > 1
    assert found[0][0] == pytest.approx(expected[0][0], rel=1e-6)
    assert found[1] == expected[1]
    assert len(sums) == 2  # one group, once in each step
