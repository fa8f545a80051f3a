"""The modulation of a block, and what activation checkpointing recomputes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgm.modules.transformer.adaln import (
    AdaLNMixin,
    CheckpointingPolicy,
    JointModulation,
    Modulation,
    modulations,
    run_checkpointed,
)
from sgm.modules.transformer.attention import attend


def test_modulation_holds_video_then_text_attention_then_mlp() -> None:
    part = AdaLNMixin(2, 8, head_size=4, time_embed_dim=6)
    with torch.no_grad():  # weights are zero, so the result is the bias: 0 … 11, each d times
        part.adaLN_modulations[1][1].bias.copy_(torch.arange(12.0).repeat_interleave(8))
        values = part.adaLN_modulations[1](torch.randn(3, 6))
        attention, mlp = modulations(values, text_length=5)
    found = [
        getattr(modulation, field)
        for modulation in (attention.video, mlp.video, attention.text, mlp.text)
        for field in ("shift", "scale", "gate")
    ]
    for index, value in enumerate(found):
        torch.testing.assert_close(value, torch.full((3, 1, 8), float(index)), rtol=0, atol=0)


def test_text_and_video_are_modulated_apart() -> None:
    def constant(shift: float, scale: float, gate: float) -> Modulation:
        return Modulation(*(torch.full((1, 1, 2), value) for value in (shift, scale, gate)))

    joint = JointModulation(text=constant(1, 2, 3), video=constant(10, 20, 30), text_length=1)
    tokens = torch.full((1, 3, 2), 2.0)
    # text: 2 · (1 + 2) + 1 = 7, video: 2 · (1 + 20) + 10 = 52
    assert joint.modulate(tokens)[0, :, 0].tolist() == [7, 52, 52]
    # with an update of 5, text: 2 + 3 · 5 = 17, video: 2 + 30 · 5 = 152
    update = torch.full((1, 3, 2), 5.0)
    assert joint.add_gated(tokens, update)[0, :, 0].tolist() == [17, 152, 152]


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "num_attentions"), [("block", 2), ("attention", 1)])
def test_only_a_kept_attention_is_not_computed_again(
    policy: CheckpointingPolicy, num_attentions: int
) -> None:
    def block(tokens: Tensor) -> Tensor:
        heads = tokens.exp().unflatten(-1, (2, 4))
        return attend(heads, heads, heads, kernel="sdpa").flatten(-2).sin()

    tokens = torch.randn(1, 5, 8, requires_grad=True)
    with Counting() as counting:
        run_checkpointed(block, tokens, policy=policy).sum().backward()
    assert counting.calls["_scaled_dot_product_flash_attention_for_cpu"] == num_attentions
    assert counting.calls["exp"] == 2
