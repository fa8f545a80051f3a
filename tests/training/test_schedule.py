"""The learning rate against values worked out by hand from SAT's rules."""

import pytest
import torch

from sgm.config import TrainingArgs
from sgm.training.deepspeed_engine import build_schedule


def rates(steps, **args):
    """Learning rates of the first `steps` optimizer steps, of 1.0 at most."""
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
    # 0.1 + 0.9 (1 + cos(π n/4))/2 for n = 1 … 4, then it stays.
    assert found[:4] == pytest.approx([0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert found[4:] == pytest.approx([0.1] * 5)
