"""Whether a training configuration can work, found out before data and weights are read."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

from sgm.errors import UserError, nearest_name
from sgm.inference.request import (
    SPATIAL_FACTOR,
    check_model_section,
    require_sizes,
    video_size,
)
from sgm.numbers import is_number

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
