"""Check the section `deepspeed` of a configuration before data and weights are read.

DeepSpeed's engine checks its settings too, but later and without naming the nearest valid key. This
module imports DeepSpeed, so ``DS_ACCELERATOR`` must be set before this module is imported.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from deepspeed.runtime.precision_config import (
    DeepSpeedBF16Config,
    DeepSpeedFP16Config,
    get_bfloat16_config,
    get_float16_config,
)
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeed_logger
from pydantic import Field, ValidationInfo, field_validator, model_validator

from sgm.config import TrainingArgs
from sgm.errors import UserError, check_known, nearest_name
from sgm.options import Options, Section, checked
from sgm.training.deepspeed_engine import REFUSALS, SAT_OPTIMIZER, reason_of

logger = logging.getLogger(__name__)

# The known keys of the section `deepspeed`. DeepSpeed ignores unknown keys silently.
_KEYS = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comm_type
    comms_logger communication_data_type compile compression_training csv_monitor
    curriculum_learning data_efficiency data_types dataloader_drop_last disable_allgather dump_state
    eigenvalue elasticity expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor graph_harvesting
    hybrid_engine load_universal_checkpoint memory_breakdown nebula optimizer pipeline
    prescale_gradients progressive_layer_drop scheduler seq_parallel_communication_data_type
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism use_node_local_storage wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""".split()
_ALIKE = 0.8  # an unknown key counts as a typo of a known key from this difflib ratio on

# The case of DeepSpeed's names does not matter. PyTorch's names are class names.
_OPTIMIZERS = [*(name for name in dir(torch.optim) if name[0].isupper()), SAT_OPTIMIZER]
_OPTIMIZERS += DEEPSPEED_OPTIMIZERS
# DeepSpeed's optimizers that take the params of a PyTorch class (name → class), and the extra
# params that only DeepSpeed's Adam has.
_TORCH_TWINS = {"adam": "Adam", "adamw": "AdamW", "adagrad": "Adagrad"}
_DEEPSPEED_ADAM = ("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states")
_BFLOAT16 = ("bfloat16", "bf16", "torch.bfloat16")  # names that DeepSpeed accepts


class _Optimizer(Section):
    """The section ``deepspeed.optimizer``."""

    type: str
    params: dict[str, Any] | None = None

    @field_validator("type")
    @classmethod
    def _check_type(cls, name: str) -> str:
        if name not in _OPTIMIZERS and name.lower() not in DEEPSPEED_OPTIMIZERS:
            raise ValueError(f"{name!r} is unknown; {nearest_name(name, _OPTIMIZERS)}")
        return name

    @field_validator("params")
    @classmethod
    def _check_params(
        cls, params: dict[str, Any] | None, info: ValidationInfo
    ) -> dict[str, Any] | None:
        """Build the optimizer as a check; DeepSpeed builds it only after the weights are read."""
        name = info.data.get("type", "")
        is_own = name.lower() in DEEPSPEED_OPTIMIZERS
        kind = getattr(torch.optim, _TORCH_TWINS.get(name.lower(), "") if is_own else name, None)
        given = params or {}
        if is_own:
            given = {key: value for key, value in given.items() if key not in _DEEPSPEED_ADAM}
        if kind is not None:
            try:
                kind([torch.zeros(1, 1, requires_grad=True)], **given)
            except REFUSALS as error:
                raise ValueError(str(error).splitlines()[0]) from None
        return params


class _Scheduler(Section):
    """The section ``deepspeed.scheduler``."""

    type: str

    @field_validator("type")
    @classmethod
    def _check_type(cls, name: str) -> str:
        if name not in VALID_LR_SCHEDULES and not hasattr(torch.optim.lr_scheduler, name):
            raise ValueError(f"{name!r} is unknown; {nearest_name(name, VALID_LR_SCHEDULES)}")
        return name


class _Autocast(Options):
    """The section ``deepspeed.torch_autocast``, for which DeepSpeed has no model."""

    enabled: bool = False
    dtype: str | None = None
    lower_precision_safe_modules: list[str] | None = None

    @model_validator(mode="after")
    def _check_dtype(self) -> _Autocast:
        # Without a dtype PyTorch uses float16 on a GPU, which does not work here. With ZeRO,
        # DeepSpeed 0.19.8 clips float16 gradients before it divides them by the loss scale. Without
        # ZeRO, the first overflows would count as non-finite gradients, although they only lower
        # the loss scale.
        if self.enabled and self.dtype not in _BFLOAT16:
            raise ValueError(
                f"dtype: {self.dtype!r} must be bfloat16; for float16 use the section fp16"
            )
        return self


class _DeepSpeed(Section):
    """The keys of the section ``deepspeed`` in which mistakes are likely."""

    train_micro_batch_size_per_gpu: int = Field(1, ge=1)
    gradient_clipping: float = Field(0.0, ge=0)
    optimizer: _Optimizer
    scheduler: _Scheduler | None = None
    zero_optimization: DeepSpeedZeroConfig = DeepSpeedZeroConfig()
    bf16: DeepSpeedBF16Config | None = None
    bfloat16: DeepSpeedBF16Config | None = None  # the older name of bf16
    fp16: DeepSpeedFP16Config = DeepSpeedFP16Config()
    torch_autocast: _Autocast | None = None

    @model_validator(mode="after")
    def _check_zero(self) -> _DeepSpeed:
        zero, half = self.zero_optimization, self.fp16
        if zero.elastic_checkpoint:
            raise ValueError("zero_optimization.elastic_checkpoint is not supported; remove it")
        # DeepSpeed 0.19.8 divides the gradients by the loss scale, but does not multiply the loss.
        if half.enabled and not zero.stage and half.loss_scale != 1:
            raise ValueError(
                "fp16: DeepSpeed does not scale the loss without ZeRO, so the model would hardly "
                "learn; set zero_optimization.stage to 1, 2 or 3, or use bf16"
            )
        return self


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Check the section `deepspeed`.

    Raises:
        UserError: the section is missing, a key is mistyped, or a value is invalid or not
            supported.
    """
    if not settings:
        raise UserError(
            "training needs a section deepspeed, which is missing in the configuration; add the "
            "section, or use a training configuration such as configs/cogvideox_2b_sft.yaml"
        )
    for key in map(str, settings.keys() - set(_KEYS)):
        if difflib.get_close_matches(key, _KEYS, n=1, cutoff=_ALIKE):
            check_known([key], _KEYS, where="deepspeed")
        else:  # a newer DeepSpeed may know the key
            logger.warning("unknown key %r in deepspeed: DeepSpeed ignores unknown keys", key)
    given = {key: value for key, value in settings.items() if value is not None}
    deepspeed_logger.disabled = True  # its warnings of deprecated keys are repeated at the start
    try:
        checked(_DeepSpeed, given, place=lambda key: f"deepspeed.{key}" if key else "deepspeed")
        # This checks the batch sizes, and the sections for which there is no class above.
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | given)
    except (*REFUSALS, DeepSpeedConfigError) as error:
        raise UserError(f"deepspeed: {reason_of(error)}") from None
    finally:
        deepspeed_logger.disabled = False


def weight_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the weights, which DeepSpeed's sections ``bf16`` and ``fp16`` set."""
    present = {key: section for key, section in settings.items() if section is not None}
    if get_bfloat16_config(present).enabled:
        return torch.bfloat16
    return torch.float16 if get_float16_config(present).enabled else torch.float32


def check_precision(args: TrainingArgs, settings: Mapping[str, Any]) -> None:
    """Check that `args.fp16` or `args.bf16`, if set, agrees with the section `deepspeed`.

    Raises:
        UserError: they disagree; only the section `deepspeed` sets the precision of training.
    """
    if (args.fp16 or args.bf16) and weight_dtype(settings) != getattr(torch, args.precision):
        raise UserError(
            "args.fp16 and args.bf16 do not set the precision of training; set fp16.enabled or "
            "bf16.enabled in the section deepspeed instead"
        )
