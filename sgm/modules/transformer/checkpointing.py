"""Activation checkpointing: which inner results of a block stay in memory for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sgm.modules.transformer.attention import ATTENTION_OPERATORS

# "block": its input alone. "attention": the attention's result too, which takes as much memory
# again and is the dearest to compute: its work grows with the square of the number of tokens.
Keep = Literal["block", "attention"]


def run_checkpointed(block: Callable[..., Tensor], *inputs: Tensor, keep: Keep) -> Tensor:
    """``block(*inputs)``, of which the backward pass computes again what is not kept.

    Dropout draws the same the second time. SAT has checkpointing of its own, but it is re-entrant
    (it needs an input with gradient), and where DeepSpeed is imported first it is DeepSpeed's,
    which recomputes outside autocast and moves a CPU model's tensors to the GPU.
    """
    options: dict[str, Any] = {}
    if keep == "attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(block, *inputs, use_reentrant=False, **options)


def _keep_attention(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operator in ATTENTION_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
