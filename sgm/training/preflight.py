"""Checks of a training configuration before data and weights are read.

PyTorch and DeepSpeed are imported only where a check needs them.
"""

from __future__ import annotations

import difflib
import logging
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from sgm.errors import UserError, check_known, nearest_name
from sgm.options import Section, checked, explain
from sgm.preflight import SPATIAL_FACTOR, check_model_section

if TYPE_CHECKING:
    import torch

    from sgm.config import TrainingArgs

logger = logging.getLogger(__name__)


VIDEO_DATASET = "data_video.SFTDataset"
SAT_OPTIMIZER = "sat.ops.FusedEmaAdam"

# Keys of the section `deepspeed`. DeepSpeed itself ignores unknown keys silently.
_DEEPSPEED_KEYS = """
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
_ALIKE = 0.8  # difflib's ratio from which on an unknown key counts as a known one, mistyped


class _Optimizer(Section):
    """The section ``deepspeed.optimizer``."""

    type: str
    params: dict[str, Any] | None = None

    @field_validator("type")
    @classmethod
    def _check_type(cls, name: str) -> str:
        if name.startswith("sat.") and name != SAT_OPTIMIZER:
            raise ValueError(f"{name!r} is not supported; of SAT's only {SAT_OPTIMIZER} is")
        return name


class _Zero(Section):
    """The section ``deepspeed.zero_optimization``."""

    stage: int = Field(0, ge=0, le=3)

    @model_validator(mode="after")
    def _check_elastic(self) -> _Zero:
        if (self.model_extra or {}).get("elastic_checkpoint"):
            raise ValueError("elastic_checkpoint is not supported; remove it")
        return self


class _DeepSpeed(Section):
    """What this code reads of the section ``deepspeed``."""

    train_micro_batch_size_per_gpu: int = Field(1, ge=1)
    gradient_clipping: float = Field(0.0, ge=0)
    optimizer: _Optimizer
    zero_optimization: _Zero | None = None
    bf16: dict[str, Any] | None = None
    bfloat16: dict[str, Any] | None = None
    fp16: dict[str, Any] | None = None
    torch_autocast: dict[str, Any] | None = None


def warn_of_warmup(args: TrainingArgs) -> None:
    """Log a warning if the first steps, with a small learning rate, are all steps."""
    if args.train_iters <= args.auto_warmup_steps:
        logger.warning(
            "auto_warmup_steps=%d covers all of train_iters=%d: the learning rate stays at 5%% of "
            "lr; set it to 0 for a short run",
            args.auto_warmup_steps,
            args.train_iters,
        )


def check_data_paths(args: TrainingArgs) -> None:
    """Check that there is training data, and that each folder of data exists.

    Raises:
        UserError: `train_data` is empty, or a folder does not exist.
    """
    if not args.train_data:
        raise UserError("args.train_data is empty; it must name at least one folder of data")
    for key in ("train_data", "valid_data"):
        for name in getattr(args, key):
            if not Path(name).expanduser().exists():
                raise UserError(
                    f"args.{key}: {name} does not exist; check the path (clips to try the bundled "
                    f"model on: python -m tools.tiny.draw_clips --output {name} --count 64)"
                )


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Check the keys of the section `deepspeed` that this code reads, without DeepSpeed.

    Raises:
        UserError: a key is mistyped, or a value is invalid or not supported.
    """
    if not settings:
        raise UserError(
            "the configuration has no section deepspeed, which training needs; use one for "
            "training, such as configs/cogvideox_2b_sft.yaml, or add the section"
        )
    for key in settings.keys() - set(_DEEPSPEED_KEYS):
        key = str(key)
        if difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1, cutoff=_ALIKE):
            check_known([key], _DEEPSPEED_KEYS, where="deepspeed")
        else:  # it may be of a newer DeepSpeed
            logger.warning("unknown key %r in deepspeed: DeepSpeed ignores unknown keys", key)
    given = {key: value for key, value in settings.items() if value is not None}
    checked(_DeepSpeed, given, place=lambda key: f"deepspeed.{key}" if key else "deepspeed")


def check_precision(args: TrainingArgs, settings: Mapping[str, Any]) -> None:
    """Check that `fp16` and `bf16` of `args`, if set, agree with the section `deepspeed`.

    Raises:
        UserError: they disagree; the section `deepspeed` decides the precision of training.
    """
    for name in ("fp16", "bf16"):
        older = "bfloat16" if name == "bf16" else name
        enabled = (settings.get(name) or settings.get(older) or {}).get("enabled")
        if getattr(args, name) and not enabled:
            raise UserError(
                f"args.{name} is set, but the section deepspeed decides the precision of training; "
                f"set deepspeed.{name}.enabled instead"
            )


def check_video_data(data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Check that clips will have the size of the network's position table.

    Only `data_video.SFTDataset` is checked; other datasets have their own sizes.

    Raises:
        UserError: `video_size` or `max_num_frames` does not fit the network, or the network is
            missing.
    """
    network = check_model_section(model)
    if data.get("target") != VIDEO_DATASET or not isinstance(data.get("params"), Mapping):
        return
    given, length = (data["params"].get(key) for key in ("video_size", "max_num_frames"))
    size = network.image_size
    if given != size:
        raise UserError(
            f"data.params.video_size: {given!r} must be {size} (height, width), that is "
            f"{SPATIAL_FACTOR} times latent_height and latent_width of this model"
        )
    if isinstance(length, int) and length > network.num_frames:
        raise UserError(
            f"data.params.max_num_frames: {length} must be at most {network.num_frames}, the "
            "num_frames of this model"
        )


# Exceptions that DeepSpeed raises for invalid settings, besides its own class.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError)
_AUTOCAST_KEYS = ("enabled", "dtype", "lower_precision_safe_modules")


def weight_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights, as DeepSpeed's sections ``bf16`` and ``fp16`` set it."""
    import torch
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config

    present = {key: section for key, section in settings.items() if section is not None}
    if get_bfloat16_config(present).enabled:
        return torch.bfloat16
    return torch.float16 if get_float16_config(present).enabled else torch.float32


def check_sections(settings: Mapping[str, Any]) -> None:
    """Check the section `deepspeed` with DeepSpeed's own models.

    DeepSpeed's engine checks it too, but after the weights are read, and without the nearest valid
    name.

    Raises:
        UserError: a key is unknown, a value is invalid, or float16 would be trained wrongly.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils import logger as deepspeed_logger

    descriptions = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,  # its older name
        "fp16": DeepSpeedFP16Config,
    }
    deepspeed_logger.disabled = True  # it warns of old names when it starts
    try:
        for name, description in descriptions.items():
            section = settings.get(name) or {}
            try:
                description(**{str(key): value for key, value in section.items()})
            except ValidationError as error:
                place = partial(_place, name)
                raise UserError(explain(error, description, place=place)) from None
            except REFUSALS as error:
                raise UserError(f"deepspeed.{name}: {reason_of(error)}") from None
        _check_half(settings)
        _check_autocast(settings.get("torch_autocast") or {})
        _check_optimizer(settings.get("optimizer") or {})
        _check_schedule(settings.get("scheduler") or {})
        present = {key: value for key, value in settings.items() if value is not None}
        if not present.keys() & {"train_batch_size", "train_micro_batch_size_per_gpu"}:
            present["train_micro_batch_size_per_gpu"] = 1
        try:  # batch sizes and the remaining sections
            DeepSpeedConfig(present)
        except (*REFUSALS, DeepSpeedConfigError) as error:
            raise UserError(f"deepspeed: {reason_of(error)}") from None
    finally:
        deepspeed_logger.disabled = False


def _place(section: str, key: str) -> str:
    return f"deepspeed.{section}.{key}" if key else f"deepspeed.{section}"


# Params of Adam that only DeepSpeed has.
_DEEPSPEED_ADAM = ("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states")


def _check_optimizer(section: Mapping[str, Any]) -> None:
    """Check the name of the optimizer, and its params if PyTorch has an optimizer of that name."""
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    name = section.get("type")
    if not name or name == SAT_OPTIMIZER:
        return
    classes = {one: kind for one, kind in vars(torch.optim).items() if isinstance(kind, type)}
    by_name = classes | {one.lower(): kind for one, kind in classes.items()}
    is_own = name.lower() in DEEPSPEED_OPTIMIZERS
    if not is_own and name not in classes:
        known = [*classes, *DEEPSPEED_OPTIMIZERS]
        raise UserError(
            f"deepspeed.optimizer.type: {name!r} is unknown; {nearest_name(name, known)}"
        )
    kind = by_name.get(name.lower() if is_own else name)
    if kind is None:  # DeepSpeed's own, which checks its params itself
        return
    params = dict(section.get("params") or {})
    if is_own:
        params = {key: value for key, value in params.items() if key not in _DEEPSPEED_ADAM}
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **params)
    except REFUSALS as error:
        raise UserError(f"deepspeed.optimizer.params: {str(error).splitlines()[0]}") from None


def _check_schedule(section: Mapping[str, Any]) -> None:
    """Check the name of DeepSpeed's learning rate schedule."""
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    name = section.get("type")
    if section and name not in VALID_LR_SCHEDULES:
        hint = nearest_name(str(name), VALID_LR_SCHEDULES)
        raise UserError(f"deepspeed.scheduler.type: {name!r} is unknown; {hint}")


def _check_half(settings: Mapping[str, Any]) -> None:
    """Check that float16 is not combined with bfloat16, and that its loss will be scaled."""
    import torch
    from deepspeed.runtime.precision_config import get_float16_config

    half = get_float16_config({"fp16": settings.get("fp16") or {}})
    if not half.enabled:
        return
    if weight_dtype(settings) == torch.bfloat16:
        raise UserError("deepspeed: bf16 and fp16 are both enabled; leave one")
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    if not stage and half.loss_scale != 1:
        # DeepSpeed 0.19.8 divides the gradients by the loss scale, but does not multiply the loss.
        raise UserError(
            "deepspeed.fp16: without ZeRO DeepSpeed does not scale the loss, so float16 would "
            "learn next to nothing; set zero_optimization.stage to 1, 2 or 3, or use bf16"
        )


def _check_autocast(section: Mapping[str, Any]) -> None:
    """Check the section ``torch_autocast``, for which DeepSpeed has no model."""
    import torch
    from deepspeed.runtime.config import DtypeEnum

    check_known(section, _AUTOCAST_KEYS, where="deepspeed.torch_autocast")
    if not section.get("enabled"):
        return
    name = section.get("dtype")
    try:
        is_bfloat16 = DtypeEnum(name).value == torch.bfloat16
    except REFUSALS:
        is_bfloat16 = False
    if not is_bfloat16:
        # Without a dtype PyTorch uses float16 on a GPU. With ZeRO, DeepSpeed 0.19.8 then clips the
        # gradients while they are still scaled; without ZeRO, the first overflows, by which the
        # scale is found, would count as gradients that are not finite.
        raise UserError(
            f"deepspeed.torch_autocast.dtype: {name!r} must be bfloat16; for float16 use the "
            "section fp16"
        )


def reason_of(error: Exception) -> str:
    """One line about an error that DeepSpeed raised for its settings."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{error.title}: {place}: {first['msg']}"
    reason = textwrap.shorten(str(error), 300, placeholder=" …") or "no reason given"
    return f"{type(error).__name__}: {reason}"
