"""ZeRO's norm of gradients and its search for infinite ones, over all tensors at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

_INVALID = -1.0  # what ZeRO makes of a norm that is not finite


def fuse_gradient_checks(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 check the gradients of a step with a few kernels instead of ten a tensor.

    The GPU has nothing else to do then and waits for the CPU, which starts these kernels one by
    one: 0.08 s of a step of 0.8 s, for LoRA's 240 tensors on an H100. Results differ in rounding
    only. Other optimizers, and ZeRO with an offloaded one, are left alone.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return
    checks = _GradientChecks(optimizer)
    optimizer.has_overflow_partitioned_grads_serial = checks.has_overflow
    optimizer.get_grad_norm_direct = checks.norm


class _GradientChecks:
    """ZeRO asks first whether gradients are finite, then for their norm; one sum answers both."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        # Of the groups whose norm has not been asked for yet, by the identity of their lists.
        self._square_sums: dict[int, Tensor] = {}

    def has_overflow(self) -> Tensor:
        """(1,) bool: some gradient of this process is not finite."""
        device = self.optimizer.device
        groups = self.optimizer.averaged_gradients.values()
        self._square_sums = {id(group): _square_sum(group, device) for group in groups}
        total = sum(self._square_sums.values(), torch.zeros((), device=device))
        return ~total.isfinite().reshape(1)

    def norm(self, gradients: Sequence[Tensor], params: Any, norm_type: float = 2) -> Tensor:
        """The norm of a group's gradients over all processes; -1 if it is not finite."""
        if norm_type != 2:
            raise NotImplementedError(f"norm_type={norm_type}: ZeRO takes the norm of order 2 only")
        total = self._square_sums.pop(id(gradients), None)
        if total is None:  # settings may leave the check before it out
            total = _square_sum(gradients, self.optimizer.device)
        distributed.all_reduce(total, group=self.optimizer.dp_process_group)
        norm = total.sqrt()
        return torch.where(norm.isfinite(), norm, torch.full_like(norm, _INVALID))


def _square_sum(gradients: Iterable[Tensor | None], device: Any) -> Tensor:
    """Sum of all squares, a float32 scalar; the zeros that fill a group up add nothing to it."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return torch.zeros((), device=device)
    # In float32: the squares of float16 gradients, scaled up as they are, leave its range.
    norms = torch._foreach_norm(present, 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()
