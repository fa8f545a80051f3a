"""The fused checks against DeepSpeed's own."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from sgm.sat_runtime import ensure_process_groups
from sgm.training import deepspeed_engine
from sgm.training.deepspeed_engine import fuse_gradient_checks


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
    assert len(sums) == 2  # of its one group, once in each step
