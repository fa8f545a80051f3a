"""DeepSpeed's engine around the training objective."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import reprlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sgm.errors import UserError, nearest_name
from sgm.training.checks import SAT_OPTIMIZER
from sgm.training.gradient_checks import fuse_gradient_checks
from sgm.training.optimizer import parameter_groups, sat_optimizer
from sgm.training.schedule import build_schedule

logger = logging.getLogger(__name__)

# Where the loss, its gradient or a weight is not finite.
WHAT_TO_DO = (
    "lower the learning rate or use bf16 in the deepspeed section, and go on from the last "
    "checkpoint with --resume"
)
# What DeepSpeed raises for settings it refuses, besides its own error.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError)


def weight_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """The precision that DeepSpeed's sections ``bf16`` and ``fp16`` give the weights."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if (settings.get(name) or {}).get("enabled") is True:
            return dtype
    return torch.float32


def check_sections(settings: Mapping[str, Any]) -> None:
    """Check sections of the `deepspeed` section by DeepSpeed's own description of them.

    Its engine does so too, but after the weights are read, and without the nearest valid name.

    Raises:
        UserError: a key is unknown, or a value is not what it may be.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils import logger as deepspeed_logger

    descriptions = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,  # its older name
        "fp16": DeepSpeedFP16Config,
    }
    deepspeed_logger.disabled = True  # of old names it will warn when it starts
    try:
        for name, description in descriptions.items():
            section = settings.get(name) or {}
            try:
                description(**{str(key): value for key, value in section.items()})
            except _REFUSALS as error:
                raise UserError(_fault(error, name, description)) from None
    finally:
        deepspeed_logger.disabled = False


def _fault(error: Exception, name: str, description: Any) -> str:
    """What is wrong with a section of which pydantic, or DeepSpeed, raised `error`."""
    if not hasattr(error, "errors"):
        return f"deepspeed.{name}: {_reason(error)}"
    first = error.errors()[0]
    *parents, key = [f"deepspeed.{name}", *(str(part) for part in first["loc"])]
    if first["type"] == "extra_forbidden":
        hint = nearest_name(key, _fields(description, parents[1:]))
        return f"unknown key {key!r} in {'.'.join(parents)}; {hint}"
    value = f"{reprlib.repr(first['input'])}: " if parents else ""
    return f"{'.'.join([*parents, key])}: {value}{first['msg']}"


def _fields(description: Any, parents: Sequence[str]) -> list[str]:
    """Names that a pydantic class has for its fields, or the class within it under `parents`."""
    for parent in parents:
        if parent in description.model_fields:  # it may be a place in a list
            kind = description.model_fields[parent].annotation
            kinds = [kind, *get_args(kind), description]  # it may be an optional class
            description = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    return [field.alias or name for name, field in description.model_fields.items()]


def start_deepspeed(objective: nn.Module, settings: Mapping[str, Any], args: Any) -> Any:
    """DeepSpeed's engine around `objective`, with the `deepspeed` section as its settings.

    The learning rate follows SAT's schedule unless the section has a ``scheduler`` of its own.

    Raises:
        UserError: nothing is trained, or DeepSpeed refuses its settings.
    """
    import deepspeed

    # DeepSpeed insists on what launchers set, also for a process that was started without one.
    os.environ.setdefault("LOCAL_RANK", "0")
    settings = dict(settings)
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
    except (*_REFUSALS, deepspeed.DeepSpeedConfigError) as error:
        logger.debug("deepspeed.initialize", exc_info=True)
        raise UserError(
            f"deepspeed refuses its settings: {_reason(error)}; change them in the section "
            "deepspeed"
        ) from None
    finally:  # it prints which of its extensions it compiled
        logger.debug(printed.getvalue())
    fuse_gradient_checks(wrapped.optimizer)
    return wrapped


def _reason(error: Exception) -> str:
    """What DeepSpeed says of its settings, on one line; of a faulty key, where it is."""
    if hasattr(error, "errors"):  # pydantic's, which checks the sections
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{error.title}: {place}: {first['msg']}"
    reason = textwrap.shorten(str(error), 300, placeholder=" …") or "no reason given"
    return f"{type(error).__name__}: {reason}"


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
    optimizer = wrapped.optimizer
    if hasattr(optimizer, "loss_scale_config"):  # without ZeRO
        smallest = optimizer.loss_scale_config.min_loss_scale
    else:
        smallest = getattr(optimizer.loss_scaler, "min_scale", None)
    return smallest is not None and optimizer.loss_scale > smallest  # a fixed one has no smallest


def gradient_norm(wrapped: Any) -> float | Tensor | None:
    """Norm of all gradients before clipping; DeepSpeed's where it computes one.

    To be called between the last backward pass of a step and the step: without ZeRO in float32
    DeepSpeed keeps no norm, and after the step the gradients are gone.
    """
    if hasattr(wrapped.optimizer, "_global_grad_norm") or wrapped.zero_optimization_stage():
        return None
    gradients = [w.grad for w in wrapped.module.parameters() if w.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
