"""DeepSpeed's engine around the training objective: optimizer, learning rate, gradient checks."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from sgm.errors import UserError
from sgm.sat_runtime import quiet_sat
from sgm.training.preflight import REFUSALS, SAT_OPTIMIZER, reason_of

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
        UserError: DeepSpeed refuses its settings.
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
    # On a CPU it would compile a reduction in shared memory that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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


# ZeRO copies the gradients of a group to float32 as it steps: groups bound that memory to 1 GiB.
GROUP_ELEMENTS = 2**28


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """SAT's groups of the trained weights: without weight decay are biases and layer norms.

    Large groups are divided, which changes no result. ``lr`` of a group is a factor of the
    learning rate.
    """
    from sat.training.deepspeed_training import get_optimizer_param_groups

    trained = [weight for weight in module.parameters() if weight.requires_grad]
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


# Share of the learning rate in the first `auto_warmup_steps`, while Adam's moments settle.
AUTO_WARMUP_RATE = 0.05
_NO_WARMUP = 1e-9  # steps: SAT divides by the length of the warm-up


def build_schedule(optimizer: Optimizer, args: Any, *, learning_rate: float) -> Any:
    """SAT's schedule, set to the first step; its `step()` is to follow each optimizer step.

    The rate rises over the share `warmup` of the steps, then stays, falls in a line to 0, or as a
    cosine to `lr_decay_ratio`. In the first `auto_warmup_steps` it is 5% at most.

    Args:
        optimizer: its parameter groups must hold factors of the learning rate as ``lr``.
        args: lr_decay_style, lr_decay_iters, lr_decay_ratio, warmup, auto_warmup_steps,
            train_iters.
        learning_rate: the highest.
    """
    from sat.training.learning_rates import AnnealingLR

    steps = args.lr_decay_iters or args.train_iters
    with quiet_sat():
        return AnnealingLR(
            optimizer,
            start_lr=learning_rate,
            warmup_iter=max(args.warmup * steps, _NO_WARMUP),
            num_iters=steps,
            decay_style=args.lr_decay_style,
            last_iter=0,
            decay_ratio=args.lr_decay_ratio,
            auto_warmup_steps=args.auto_warmup_steps,
            auto_warmup_rate=AUTO_WARMUP_RATE,
        )


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
