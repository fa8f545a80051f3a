"""Whether a training configuration can work, found out before data and weights are read.

PyTorch and DeepSpeed are imported only where a check needs them.
"""

from __future__ import annotations

import difflib
import logging
import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sgm.errors import UserError, nearest_name
from sgm.preflight import SPATIAL_FACTOR, check_model_section, require_sizes, video_size
from sgm.util import is_number

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


VIDEO_DATASET = "data_video.SFTDataset"
SAT_OPTIMIZER = "sat.ops.FusedEmaAdam"

# Least values of numbers in `args`.
_LEAST = {
    "train_iters": 1,
    "eval_iters": 1,
    "eval_interval": 1,
    "eval_batch_size": 1,
    "save_interval": 1,
    "save_total_limit": 0,
    "log_interval": 1,
    "num_workers": 0,
    "nonfinite_limit": 1,
    "auto_warmup_steps": 0,
    "valid_videos": 0,
    "warmup": 0,
    "ema_decay": 0,
}
# Greatest values.
_MOST = {"warmup": 1, "ema_decay": 0.999999, "lr_decay_ratio": 1}
# Sections of DeepSpeed's settings, which skips in silence what it does not know.
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
_ALIKE = 0.8  # of difflib, from which on an unknown name is a known one, mistyped
# What torch.manual_seed takes, less the room that ranks and epochs, added to it, need.
_SEED_LIMIT = 2**63


def check_args(args: Any) -> None:
    """Check the values of `TrainingArgs`.

    Raises:
        UserError: one is out of its range.
    """
    for key, least in _LEAST.items():
        if not getattr(args, key) >= least:  # NaN is not either
            raise UserError(f"{key}={getattr(args, key)}: it must be at least {least}")
    for key, most in _MOST.items():
        if not getattr(args, key) <= most:
            raise UserError(f"{key}={getattr(args, key)}: it must be at most {most}")
    if args.train_iters <= args.auto_warmup_steps:
        logger.warning(
            "auto_warmup_steps=%d covers all of train_iters=%d: the learning rate stays at 5%% of "
            "lr; set it to 0 for a short run",
            args.auto_warmup_steps,
            args.train_iters,
        )
    if not args.lr_decay_ratio > 0:
        raise UserError(f"lr_decay_ratio={args.lr_decay_ratio}: it must be above 0")
    if args.lr_decay_iters is not None and args.lr_decay_iters < 1:
        raise UserError(f"lr_decay_iters={args.lr_decay_iters}: it must be at least 1")
    if not args.save:
        raise UserError("save is empty; it must be the folder for the runs' folders")
    if "/" in args.experiment_name or not args.experiment_name:
        raise UserError(
            f"experiment_name={args.experiment_name!r}: it must be the name of a folder in `save`, "
            "without a slash"
        )
    if not -_SEED_LIMIT <= args.seed < _SEED_LIMIT:
        raise UserError(f"seed={args.seed}: it must be from -2**63 to 2**63 - 1")


def check_data_paths(args: Any) -> None:
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
    """Check what this code reads of the `deepspeed` section; the rest DeepSpeed checks.

    Raises:
        UserError: a value is of another form, or not supported.
    """
    if not settings:
        raise UserError(
            "the configuration has no section deepspeed, which training needs; name one for "
            "training, such as configs/cogvideox_2b_sft.yaml, or add the section"
        )
    for key in settings:
        _check_deepspeed_key(str(key))
    batch_size = settings.get("train_micro_batch_size_per_gpu", 1)
    if not _is_int(batch_size) or batch_size < 1:
        raise UserError(
            f"deepspeed.train_micro_batch_size_per_gpu: {batch_size!r} must be a whole number "
            "from 1 ('auto' is not supported)"
        )
    clipping = settings.get("gradient_clipping", 0.0)
    if not (is_number(clipping) and clipping >= 0):
        raise UserError(f"deepspeed.gradient_clipping: {clipping!r} must be a number from 0")
    optimizer = _section(settings.get("optimizer"), "optimizer")
    _section(optimizer.get("params"), "optimizer.params")
    if not optimizer:
        raise UserError("deepspeed.optimizer is absent; training needs one, for example AdamW")
    kind = optimizer.get("type")
    if not isinstance(kind, str):
        raise UserError(f"deepspeed.optimizer.type: {kind!r} must be a name, for example AdamW")
    if kind.startswith("sat.") and kind != SAT_OPTIMIZER:
        raise UserError(
            f"deepspeed.optimizer.type: {kind!r} is not supported; of SAT's only {SAT_OPTIMIZER} is"
        )
    for name in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        _section(settings.get(name), name)
    zero = _section(settings.get("zero_optimization"), "zero_optimization")
    stage = zero.get("stage", 0)
    if not _is_int(stage) or not 0 <= stage <= 3:
        raise UserError(f"deepspeed.zero_optimization.stage: {stage!r} may be 0, 1, 2 or 3")
    if zero.get("elastic_checkpoint"):
        raise UserError(
            "deepspeed.zero_optimization: elastic_checkpoint is not supported; remove it"
        )


def _check_deepspeed_key(key: str) -> None:
    """Raise UserError for a mistyped key; one that is like no other may be of a newer DeepSpeed."""
    if key in _DEEPSPEED_KEYS:
        return
    if difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1, cutoff=_ALIKE):
        raise UserError(f"unknown key {key!r} in deepspeed; {nearest_name(key, _DEEPSPEED_KEYS)}")
    logger.warning("unknown key %r in deepspeed: DeepSpeed leaves out what it does not know", key)


def check_precision(args: Any, settings: Mapping[str, Any]) -> None:
    """Check that `fp16` and `bf16` of `args`, where they are set, agree with `deepspeed`.

    Raises:
        UserError: they do not; the precision of training is DeepSpeed's.
    """
    for name in ("fp16", "bf16"):
        older = "bfloat16" if name == "bf16" else name
        enabled = (settings.get(name) or settings.get(older) or {}).get("enabled")
        if getattr(args, name) and not enabled:
            raise UserError(
                f"{name} is set, but training has the precision of the section deepspeed; set "
                f"deepspeed.{name}.enabled there instead"
            )


def check_video_data(data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Check that clips will have the size that the network's position table was made for.

    Other datasets than the one of clips know their sizes themselves; nothing is said about them.

    Raises:
        UserError: `video_size` or `max_num_frames` does not fit the network, or there is none.
    """
    network = check_model_section(model)
    if data.get("target") != VIDEO_DATASET or not isinstance(data.get("params"), Mapping):
        return
    require_sizes(network, ("latent_height", "latent_width", "num_frames"))
    size = video_size(network)
    given, length = (data["params"].get(key) for key in ("video_size", "max_num_frames"))
    if given != size:
        raise UserError(
            f"data.params.video_size: {given!r} must be {size} (height, width), that is "
            f"{SPATIAL_FACTOR} times latent_height and latent_width of this model"
        )
    if _is_int(length) and length > network["num_frames"]:
        raise UserError(
            f"data.params.max_num_frames: {length} must be at most {network['num_frames']}, the "
            "num_frames of this model"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _section(value: Any, name: str) -> Mapping[str, Any]:
    """A part of the `deepspeed` section; absent is empty, and UserError if it is a value."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"deepspeed.{name}: {value!r} must hold keys, not a value")
    return value


# What DeepSpeed raises for settings it refuses, besides its own error.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError)
_AUTOCAST_KEYS = ("enabled", "dtype", "lower_precision_safe_modules")


def weight_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """The precision that DeepSpeed's sections ``bf16`` and ``fp16`` give the weights."""
    import torch
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config

    present = {key: section for key, section in settings.items() if section is not None}
    if get_bfloat16_config(present).enabled:
        return torch.bfloat16
    return torch.float16 if get_float16_config(present).enabled else torch.float32


def check_sections(settings: Mapping[str, Any]) -> None:
    """Check sections of the `deepspeed` section by DeepSpeed's own description of them.

    Its engine does so too, but after the weights are read, and without the nearest valid name.

    Raises:
        UserError: a key is unknown, a value is not what it may be, or float16 would be trained
            wrongly.
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
            except REFUSALS as error:
                raise UserError(_fault(error, name, description)) from None
    finally:
        deepspeed_logger.disabled = False
    _check_autocast(settings.get("torch_autocast") or {})
    _check_half(settings)
    _check_optimizer(settings.get("optimizer") or {})
    _check_schedule(settings.get("scheduler") or {})


# Params of Adam that are DeepSpeed's own; PyTorch's classes do not know them.
_DEEPSPEED_ADAM = ("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states")


def _check_optimizer(section: Mapping[str, Any]) -> None:
    """Check name and params of the optimizer, as far as PyTorch has one of that name."""
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
    if kind is None:  # only DeepSpeed has it, and checks its params
        return
    params = dict(section.get("params") or {})
    if is_own:
        params = {key: value for key, value in params.items() if key not in _DEEPSPEED_ADAM}
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **params)
    except REFUSALS as error:
        raise UserError(f"deepspeed.optimizer.params: {str(error).splitlines()[0]}") from None


def _check_schedule(section: Mapping[str, Any]) -> None:
    """Check the name of a schedule of DeepSpeed's."""
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    name = section.get("type")
    if section and name not in VALID_LR_SCHEDULES:
        hint = nearest_name(str(name), VALID_LR_SCHEDULES)
        raise UserError(f"deepspeed.scheduler.type: {name!r} is unknown; {hint}")


def _check_half(settings: Mapping[str, Any]) -> None:
    """Check that float16 is not beside bfloat16, and will be trained with its scale of the loss."""
    import torch
    from deepspeed.runtime.precision_config import get_float16_config

    half = get_float16_config({"fp16": settings.get("fp16") or {}})
    if not half.enabled:
        return
    if weight_dtype(settings) == torch.bfloat16:
        raise UserError("deepspeed: bf16 and fp16 are both enabled; leave one")
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    if not stage and half.loss_scale != 1:
        # DeepSpeed 0.19.8 divides gradients by the scale of the loss, which it does not multiply.
        raise UserError(
            "deepspeed.fp16: without ZeRO DeepSpeed does not scale the loss, so that float16 would "
            "learn next to nothing; set zero_optimization.stage to 1, 2 or 3, or use bf16"
        )


def _check_autocast(section: Mapping[str, Any]) -> None:
    """Check the section ``torch_autocast``, of which DeepSpeed has no description."""
    import torch
    from deepspeed.runtime.config import DtypeEnum

    for key in section:
        if key not in _AUTOCAST_KEYS:
            hint = nearest_name(str(key), _AUTOCAST_KEYS)
            raise UserError(f"unknown key {str(key)!r} in deepspeed.torch_autocast; {hint}")
    if not section.get("enabled"):
        return
    name = section.get("dtype")
    try:
        is_bfloat16 = DtypeEnum(name).value == torch.bfloat16
    except REFUSALS:
        is_bfloat16 = False
    if not is_bfloat16:
        # Without a dtype PyTorch's default is float16 on a GPU. There DeepSpeed 0.19.8 clips the
        # gradients under ZeRO while they are scaled up; without ZeRO the loop would take the
        # first overflows, with which the scale is found, for gradients that are not finite.
        raise UserError(
            f"deepspeed.torch_autocast.dtype: {name!r} must be bfloat16; float16 is for the "
            "section fp16"
        )


def _fault(error: Exception, name: str, description: Any) -> str:
    """What is wrong with a section of which pydantic, or DeepSpeed, raised `error`."""
    if not hasattr(error, "errors"):
        return f"deepspeed.{name}: {reason_of(error)}"
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


def reason_of(error: Exception) -> str:
    """What DeepSpeed says of its settings, on one line; of a faulty key, where it is."""
    if hasattr(error, "errors"):  # pydantic's, which checks the sections
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{error.title}: {place}: {first['msg']}"
    reason = textwrap.shorten(str(error), 300, placeholder=" …") or "no reason given"
    return f"{type(error).__name__}: {reason}"
