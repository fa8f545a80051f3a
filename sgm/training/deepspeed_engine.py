"""DeepSpeed's engine around the training objective."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.training.checks import SAT_OPTIMIZER
from sgm.training.deepspeed_settings import REFUSALS, reason_of
from sgm.training.gradient_checks import fuse_gradient_checks
from sgm.training.optimizer import parameter_groups, sat_optimizer
from sgm.training.schedule import build_schedule

logger = logging.getLogger(__name__)

# Where the loss, its gradient or a weight is not finite.
WHAT_TO_DO = (
    "lower the learning rate or use bf16 in the deepspeed section, and go on from the last "
    "checkpoint with --resume"
)


def start_deepspeed(objective: nn.Module, settings: Mapping[str, Any], args: Any) -> Any:
    """DeepSpeed's engine around `objective`, with the `deepspeed` section as its settings.

    The learning rate follows SAT's schedule unless the section has a ``scheduler`` of its own.

    Raises:
        UserError: nothing is trained, or DeepSpeed refuses its settings.
    """
    import deepspeed

    # DeepSpeed insists on what launchers set, also for a process that was started without one.
    os.environ.setdefault("LOCAL_RANK", "0")
    # A section without a value is absent for the checks here; DeepSpeed would want its keys.
    settings = {key: value for key, value in settings.items() if value is not None}
    params = settings["optimizer"].get("params") or {}
    learning_rate = params.get("lr", 1e-3)  # the default of Adam in PyTorch
    groups = parameter_groups(objective)
    schedule = None
    if settings.get("scheduler"):
        groups = [{k: value for k, value in group.items() if k != "lr"} for group in groups]
    else:

        def schedule(optimizer: torch.optim.Optimizer) -> Any:
            return build_schedule(optimizer, args, learning_rate=learning_rate)

    optimizer = None
    if settings["optimizer"]["type"] == SAT_OPTIMIZER:
        # DeepSpeed knows its own and PyTorch's optimizers by name; SAT's is handed to it ready.
        del settings["optimizer"]
        optimizer = sat_optimizer(params)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            wrapped, *_ = deepspeed.initialize(
                model=objective,
                model_parameters=groups,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=settings,
            )
    except (*REFUSALS, deepspeed.DeepSpeedConfigError) as error:
        logger.debug("deepspeed.initialize", exc_info=True)
        raise UserError(
            f"deepspeed refuses its settings: {reason_of(error)}; change them in the section "
            "deepspeed"
        ) from None
    finally:  # it prints which of its extensions it compiled
        logger.debug(printed.getvalue())
    fuse_gradient_checks(wrapped.optimizer)
    return wrapped


@contextlib.contextmanager
def gathered(wrapped: Any, weights: list[nn.Parameter]) -> Iterator[None]:
    """Within it `weights` are whole on every process, also where ZeRO-3 divides them."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(weights, enabled=wrapped.zero_optimization_stage() == 3):
        yield


@contextlib.contextmanager
def outside_forward(wrapped: Any) -> Iterator[None]:
    """Within it parts of the model may be called by themselves, not through DeepSpeed's engine.

    ZeRO-3 brings a weight together when its module is called. Those that are read otherwise, such
    as the position table and LoRA's matrices, it looks for in its own forward pass only, unless
    told to as here.
    """
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    divided = [
        module._parameters
        for module in wrapped.module.modules()
        if isinstance(module._parameters, ZeROOrderedDict)
    ]
    for weights in divided:
        weights._in_forward = True
    try:
        yield
    finally:
        for weights in divided:
            weights._in_forward = False


def take_step(wrapped: Any) -> None:
    """The engine's step.

    Raises:
        UserError: float16's gradients still overflow at the smallest scale of the loss.
    """
    try:
        wrapped.step()
    except Exception as error:  # which is all that DeepSpeed says it is
        if "scale already at minimum" not in str(error):
            raise
        raise UserError(
            "the gradients of float16 overflow at every scale of the loss, down to the smallest; "
            f"{WHAT_TO_DO}"
        ) from None


def seeks_scale(wrapped: Any) -> bool:
    """Whether float16 can still lower the scale of the loss, so that an overflow is nothing odd."""
    if not wrapped.fp16_enabled():
        return False
    smallest = getattr(wrapped.optimizer.loss_scaler, "min_scale", None)  # a fixed one has none
    return smallest is not None and wrapped.optimizer.loss_scale > smallest


def gradient_norm(wrapped: Any) -> float | Tensor | None:
    """Norm of all gradients before clipping; DeepSpeed's where it computes one.

    To be called between the last backward pass of a step and the step: without ZeRO in float32
    DeepSpeed keeps no norm, and after the step the gradients are gone.
    """
    if hasattr(wrapped.optimizer, "_global_grad_norm") or wrapped.zero_optimization_stage():
        return None
    gradients = [w.grad for w in wrapped.module.parameters() if w.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
