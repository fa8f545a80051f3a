"""DeepSpeed's engine around the training objective: optimizer, learning rate, gradient checks."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from subprocess import SubprocessError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from sgm.config import TrainingArgs
from sgm.errors import UserError
from sgm.sat_runtime import quiet_sat

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from sat.training.learning_rates import AnnealingLR

logger = logging.getLogger(__name__)

SAT_OPTIMIZER = "sat.ops.FusedEmaAdam"
# Exceptions that DeepSpeed raises for invalid settings, besides its own class.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError)


def reason_of(error: Exception) -> str:
    """One line about an error that DeepSpeed raised for its settings."""
    reason = textwrap.shorten(str(error), 300, placeholder=" …") or "no reason given"
    return f"{type(error).__name__}: {reason}"


# For messages about a loss, gradient or weight that is not finite.
NONFINITE_ADVICE = (
    "lower the learning rate or use bf16 in the deepspeed section, and continue from the last "
    "checkpoint with --resume"
)


def start_deepspeed(
    objective: nn.Module, settings: Mapping[str, Any], args: TrainingArgs
) -> DeepSpeedEngine:
    """Build DeepSpeed's engine around `objective`, with the `deepspeed` section as its settings.

    The learning rate follows SAT's schedule unless the section has a ``scheduler`` of its own.

    Raises:
        UserError: DeepSpeed rejects its settings.
    """
    import deepspeed

    # DeepSpeed needs this variable of launchers, also in a process that was started without one.
    os.environ.setdefault("LOCAL_RANK", "0")
    # The checks here treat a section without a value as missing; DeepSpeed would read its keys.
    settings = {key: value for key, value in settings.items() if value is not None}
    params = settings["optimizer"].get("params") or {}
    learning_rate = params.get("lr", 1e-3)  # the default of Adam in PyTorch
    groups = parameter_groups(objective)
    build = functools.partial(build_schedule, args=args, learning_rate=learning_rate)
    schedule = None if settings.get("scheduler") else build
    if schedule is None:
        groups = [{k: value for k, value in group.items() if k != "lr"} for group in groups]
    optimizer = None
    if settings["optimizer"]["type"] == SAT_OPTIMIZER:
        # DeepSpeed knows its own and PyTorch's optimizers by name; it is given SAT's as a function.
        del settings["optimizer"]
        optimizer = functools.partial(sat_optimizer, params=params)
    # On a CPU DeepSpeed would compile a shared-memory reduction that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the extensions that it compiles
            wrapped, *_ = deepspeed.initialize(
                model=objective,
                model_parameters=groups,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=settings,
            )
    except (*REFUSALS, deepspeed.DeepSpeedConfigError) as error:
        raise UserError(
            f"deepspeed refuses its settings: {reason_of(error)}; change them in the section "
            "deepspeed"
        ) from error
    fuse_gradient_checks(wrapped.optimizer)
    return wrapped


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module that are trained, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


@contextlib.contextmanager
def gathered(wrapped: DeepSpeedEngine, weights: list[nn.Parameter]) -> Iterator[None]:
    """In this context `weights` are whole on each process, also where ZeRO-3 divides them."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(weights, enabled=wrapped.zero_optimization_stage() == 3):
        yield


@contextlib.contextmanager
def outside_forward(wrapped: DeepSpeedEngine) -> Iterator[None]:
    """In this context parts of the model can be called directly, not through DeepSpeed's engine.

    ZeRO-3 gathers a module's weights when the module is called. Weights that are read without a
    call of their module, such as the position table and LoRA matrices, it gathers only during its
    own forward pass, or while ``_in_forward`` is set, as it is here.
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


def take_step(wrapped: DeepSpeedEngine) -> None:
    """Call the engine's step.

    Raises:
        UserError: float16's gradients still overflow at the smallest scale of the loss.
    """
    try:
        wrapped.step()
    except Exception as error:  # DeepSpeed raises a bare Exception
        if "scale already at minimum" not in str(error):
            raise
        raise UserError(
            "the gradients of float16 overflow at every scale of the loss, down to the smallest; "
            f"{NONFINITE_ADVICE}"
        ) from None


def seeks_scale(wrapped: DeepSpeedEngine) -> bool:
    """Whether float16 can still lower the scale of the loss, so that an overflow is expected."""
    if not wrapped.fp16_enabled():
        return False
    smallest = getattr(wrapped.optimizer.loss_scaler, "min_scale", None)  # a fixed scale has none
    return smallest is not None and wrapped.optimizer.loss_scale > smallest


def gradient_norm(wrapped: DeepSpeedEngine) -> Tensor | None:
    """Norm of all gradients before clipping; None if DeepSpeed computes it itself.

    Call it between the last backward pass of a step and the step. Without ZeRO in float32 DeepSpeed
    keeps no norm, and after the step the gradients are gone.
    """
    if hasattr(wrapped.optimizer, "_global_grad_norm") or wrapped.zero_optimization_stage():
        return None
    gradients = [w.grad for w in wrapped.module.parameters() if w.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


# ZeRO copies the gradients of a group to float32 during the step. This limits the copy to 1 GiB.
GROUP_ELEMENTS = 2**28


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """SAT's parameter groups of the trained weights: no weight decay for biases and layer norms.

    Large groups are divided, which changes no result. ``lr`` of a group is a factor of the
    learning rate.
    """
    from sat.training.deepspeed_training import get_optimizer_param_groups

    every = sum(weight.numel() for weight in module.parameters())
    trained = sum(weight.numel() for weight in trained_weights(module).values())
    logger.info("training %.2f M of %.2f M parameters", trained / 1e6, every / 1e6)
    with quiet_sat():
        groups = get_optimizer_param_groups(module)
    seen: set[nn.Parameter] = set()
    return [part for group in groups for part in _divided(group, seen)]


def _divided(group: Mapping[str, Any], seen: set[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of limited size; a weight that two modules share, as in T5, is included once."""
    parts: list[list[nn.Parameter]] = [[]]
    for weight in group["params"]:
        if weight in seen:
            continue
        seen.add(weight)
        if parts[-1] and sum(w.numel() for w in parts[-1]) + weight.numel() > GROUP_ELEMENTS:
            parts.append([])
        parts[-1].append(weight)
    return [{**group, "params": part} for part in parts]


def sat_optimizer(groups: Sequence[object], *, params: Mapping[str, Any]) -> Optimizer:
    """SAT's fused Adam for groups of weights; its CUDA code is compiled at first use.

    Raises:
        UserError: the code cannot be compiled.
    """
    from sat import ops

    try:
        return ops.FusedEmaAdam(groups, **params)
    except (IndexError, OSError, RuntimeError, AssertionError, SubprocessError) as error:
        raise UserError(
            f"deepspeed.optimizer.type: {SAT_OPTIMIZER} cannot be compiled here "
            f"({type(error).__name__}); it needs a GPU and nvcc; without them use type: AdamW"
        ) from error


class StepGuard:
    """Skips steps of an optimizer on request: weights and moments stay as they are.

    DeepSpeed reduces, clips and clears gradients as usual; only the optimizer that it calls finds
    no gradients while `void` is set.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.void = False
        optimizer.register_step_pre_hook(self._drop_gradients)

    def _drop_gradients(self, optimizer: Optimizer, *_: object) -> None:
        if self.void:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = None


# Fraction of the learning rate in the first `auto_warmup_steps`, while Adam's moments settle.
AUTO_WARMUP_RATE = 0.05
_NO_WARMUP = 1e-9  # steps; not 0, since SAT divides by the length of the warm-up


def build_schedule(
    optimizer: Optimizer, args: TrainingArgs, *, learning_rate: float
) -> AnnealingLR:
    """SAT's schedule, set to the first step; call its `step()` after each optimizer step.

    The rate rises during the fraction `warmup` of the steps. Then it stays constant, falls linearly
    to 0, or as a cosine to the fraction `lr_decay_ratio`. In the first `auto_warmup_steps` it is 5%
    at most.

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


_INVALID = -1.0  # ZeRO's value for a norm that is not finite


def fuse_gradient_checks(optimizer: object) -> None:
    """Make ZeRO 1 and 2 check the gradients of a step with a few kernels instead of ten a tensor.

    The GPU is idle then and waits for the CPU, which launches these kernels one by one: 0.08 s of a
    step of 0.8 s, for LoRA's 240 tensors on an H100. Results differ in rounding only. Other
    optimizers, and ZeRO with an offloaded one, are not changed.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return
    checks = _GradientChecks(optimizer)
    optimizer.has_overflow_partitioned_grads_serial = checks.has_overflow
    optimizer.get_grad_norm_direct = checks.norm


class _GradientChecks:
    """Computes one sum of squares for both of ZeRO's questions: are gradients finite, their norm.

    ZeRO calls `has_overflow` first, then `norm` for each group.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self.optimizer = optimizer
        # Sums of the groups for which `norm` was not called yet, by the identity of their lists.
        self._square_sums: dict[int, Tensor] = {}

    def has_overflow(self) -> Tensor:
        """(1,) bool: some gradient of this process is not finite."""
        device = self.optimizer.device
        groups = self.optimizer.averaged_gradients.values()
        self._square_sums = {id(group): _square_sum(group, device) for group in groups}
        total = sum(self._square_sums.values(), torch.zeros((), device=device))
        return ~total.isfinite().reshape(1)

    def norm(self, gradients: Sequence[Tensor], params: object, norm_type: float = 2) -> Tensor:
        """The norm of a group's gradients over all processes; -1 if it is not finite."""
        if norm_type != 2:
            raise NotImplementedError(f"norm_type={norm_type}: ZeRO takes the norm of order 2 only")
        total = self._square_sums.pop(id(gradients), None)
        if total is None:  # some settings of DeepSpeed skip the check for overflow
            total = _square_sum(gradients, self.optimizer.device)
        distributed.all_reduce(total, group=self.optimizer.dp_process_group)
        norm = total.sqrt()
        return torch.where(norm.isfinite(), norm, torch.full_like(norm, _INVALID))


def _square_sum(gradients: Iterable[Tensor | None], device: str | torch.device) -> Tensor:
    """Sum of all squares, a float32 scalar; the zeros that pad a group do not change it."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return torch.zeros((), device=device)
    # In float32: the squares of scaled float16 gradients exceed the range of float16.
    norms = torch._foreach_norm(present, 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()
