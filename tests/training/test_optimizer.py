"""Groups of trained weights, and steps that are made void."""

import pytest
import torch
from torch import nn

from sgm.training import deepspeed_engine as module
from sgm.training.deepspeed_engine import StepGuard, parameter_groups


def test_biases_and_norms_have_no_weight_decay_and_frozen_weights_no_group():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    net[2].requires_grad_(False)
    groups = parameter_groups(net)
    decayed = [w for g in groups if g.get("weight_decay") != 0.0 for w in g["params"]]
    others = [w for g in groups if g.get("weight_decay") == 0.0 for w in g["params"]]
    assert [id(w) for w in decayed] == [id(net[0].weight)]
    assert {id(w) for w in others} == {id(net[0].bias), id(net[1].weight), id(net[1].bias)}


def test_large_groups_are_divided_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(module, "GROUP_ELEMENTS", 10)
    net = nn.Sequential(*(nn.Linear(3, 2, bias=False) for _ in range(3)))  # 6 elements each
    groups = parameter_groups(net)
    assert [len(group["params"]) for group in groups] == [1, 1, 1]
    assert all(group["lr"] == 1.0 for group in groups)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_void_step_changes_neither_weights_nor_moments(foreach):
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
