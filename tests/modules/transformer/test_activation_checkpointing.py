"""What checkpointing computes a second time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgm.modules.transformer.adaln import Keep, run_checkpointed
from sgm.modules.transformer.attention import attend


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "num_attentions"), [("block", 2), ("attention", 1)])
def test_only_a_kept_attention_is_not_computed_again(keep: Keep, num_attentions: int) -> None:
    def block(tokens: Tensor) -> Tensor:
        heads = tokens.exp().unflatten(-1, (2, 4))
        return attend(heads, heads, heads, kernel="sdpa").flatten(-2).sin()

    tokens = torch.randn(1, 5, 8, requires_grad=True)
    with Counting() as counting:
        run_checkpointed(block, tokens, keep=keep).sum().backward()
    assert counting.calls["_scaled_dot_product_flash_attention_for_cpu"] == num_attentions
    assert counting.calls["exp"] == 2
