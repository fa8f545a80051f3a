"""What is trained, in the groups that optimizers and learning-rate schedule work on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from subprocess import SubprocessError
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sgm.errors import UserError
from sgm.modules.transformer.sat_runtime import quiet_sat
from sgm.training.checks import SAT_OPTIMIZER

logger = logging.getLogger(__name__)

# ZeRO copies the gradients of a group to float32 as it steps: groups bound that memory to 1 GiB.
GROUP_ELEMENTS = 2**28


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """SAT's groups of the trained weights: without weight decay are biases and layer norms.

    Large groups are divided, which changes no result. ``lr`` of a group is a factor of the
    learning rate.

    Raises:
        UserError: nothing is trained.
    """
    from sat.training.deepspeed_training import get_optimizer_param_groups

    trained = [weight for weight in module.parameters() if weight.requires_grad]
    if not trained:
        raise UserError("no weight is trained; check not_trainable_prefixes and lora_config")
    every = sum(weight.numel() for weight in module.parameters())
    own = sum(weight.numel() for weight in trained)
    size = sum(weight.numel() * weight.element_size() for weight in trained) / 2**20
    logger.info(
        "training %.2f M of %.2f M parameters (%d tensors, %.1f MiB)",
        *(own / 1e6, every / 1e6, len(trained), size),
    )
    with quiet_sat():
        groups = get_optimizer_param_groups(module)
    seen: set[nn.Parameter] = set()
    return [part for group in groups for part in _divided(group, seen)]


def _divided(group: Mapping[str, Any], seen: set[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of bounded size; a weight that two modules share, as in T5, is taken once."""
    parts: list[list[nn.Parameter]] = [[]]
    for weight in group["params"]:
        if weight in seen:
            continue
        seen.add(weight)
        if parts[-1] and sum(w.numel() for w in parts[-1]) + weight.numel() > GROUP_ELEMENTS:
            parts.append([])
        parts[-1].append(weight)
    return [{**group, "params": part} for part in parts]


def sat_optimizer(params: Mapping[str, Any]) -> Callable[[Sequence[Any]], Optimizer]:
    """A builder of SAT's fused Adam, whose CUDA code is compiled the first time."""
    return functools.partial(_build_sat_optimizer, **params)


def _build_sat_optimizer(groups: Sequence[Any], **params: Any) -> Optimizer:
    """SAT's optimizer; UserError where it cannot be compiled."""
    from sat import ops

    try:
        return ops.FusedEmaAdam(groups, **params)
    except (IndexError, OSError, RuntimeError, AssertionError, SubprocessError) as error:
        logger.debug("%s", SAT_OPTIMIZER, exc_info=True)
        raise UserError(
            f"deepspeed.optimizer.type: {SAT_OPTIMIZER} cannot be compiled here "
            f"({type(error).__name__}); it needs a GPU and nvcc; without them use type: AdamW"
        ) from None


class StepGuard:
    """Makes steps of an optimizer void: weights and moments stay as they are.

    DeepSpeed goes through its motions (reducing, clipping, clearing gradients) as always; only
    the optimizer at its core finds no gradients.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.void = False
        optimizer.register_step_pre_hook(self._drop_gradients)

    def _drop_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        if self.void:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = None
