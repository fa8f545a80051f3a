"""Training of the transformer: ``python train_video.py --base config.yaml [--flags]``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from arguments import parse_config
from sgm.cli import run_and_exit, set_up_logging
from sgm.config import Config, TrainingArgs
from sgm.errors import UserError
from sgm.preflight import RunWeights, find_weights
from sgm.toolchain import can_compile_kernels, check_compile
from sgm.training.preflight import (
    VIDEO_DATASET,
    check_data_paths,
    check_deepspeed,
    check_precision,
    check_video_data,
    warn_of_warmup,
)

if TYPE_CHECKING:
    import torch
    from torch.utils.data import ConcatDataset, DataLoader, Dataset

    from sgm.data.cache import Cache
    from sgm.engine import SATVideoDiffusionEngine
    from sgm.training.ema import WeightAverage
    from sgm.training.validation import Validation

# As in sample_video.py, heavy modules are imported once the configuration is known to be sound.

logger = logging.getLogger(__name__)

COMPILE_STEPS = 300  # from so many on, a run on a GPU is compiled


def text_device(config: Config, device: torch.device) -> str | torch.device:
    """Where the text encoder runs: beside the network, on `device`, unless `args` say the CPU."""
    return "cpu" if config.args.text_device == "cpu" else device


def build_engine(
    config: Config, weights: RunWeights, *, checkpoint: Path | None = None
) -> tuple[SATVideoDiffusionEngine, Callable[[torch.device], None]]:
    """The engine in training mode on the device "meta", compared with its files of weights.

    Args:
        config: the configuration.
        weights: what was found for it. The transformer's are not used in mode pretrain, where
            weights are random.
        checkpoint: the folder of an iteration to go on with; its weights take the place of those
            in `load`, or join them where they are a LoRA.

    Returns:
        The engine, and what puts its weights in place on a device.

    Raises:
        UserError: the configuration or a file of weights is wrong.
    """
    from sgm.checkpoint.find import find_transformer
    from sgm.checkpoint.lora import check_trained_lora, load_lora
    from sgm.data.cache_keys import check_cacheable
    from sgm.engine import SATVideoDiffusionEngine
    from sgm.training.checkpoint import check_conditioner, holds_lora, restore_conditioner
    from sgm.training.preflight import weight_dtype
    from sgm.util import check_params

    args = config.args
    saved = None if checkpoint is None else find_transformer(checkpoint, option="resume")
    is_lora = saved is not None and holds_lora(saved)
    load = weights.transformer if saved is None or is_lora else saved
    extra = {"load": load, "device": "meta", "dtype": weight_dtype(config.deepspeed)}
    extra["cached_input"] = bool(args.cache_dir)
    params = check_params(
        SATVideoDiffusionEngine, weights.within(config.model) | extra, where=config.place("model")
    )
    if not params.get("loss_fn_config"):
        raise UserError(f"{config.place('model')}: loss_fn_config is absent; training needs one")
    engine = SATVideoDiffusionEngine(**params).train()
    engine.check_trained()
    if args.cache_dir:
        check_cacheable(config.model["conditioner_config"])
    if checkpoint is not None and engine.model.diffusion_model.lora_config and not is_lora:
        raise UserError(
            f"{checkpoint} holds a whole model, but the configuration trains a LoRA; to train one "
            f"on it, start a new run with --load {checkpoint}"
        )
    stored = {}
    if is_lora:
        check_trained_lora(engine.model.diffusion_model, saved)
    elif saved is not None:
        stored = check_conditioner(engine, saved)

    def load_weights(device: torch.device) -> None:
        engine.load_weights(device, text_device=text_device(config, device))
        network = engine.model.diffusion_model
        network.set_attention(args.attention)
        if is_lora:
            load_lora(network, saved, base=engine.base_fingerprint)
            saved.release()
        restore_conditioner(engine, stored)
        stored.clear()

    return engine, load_weights


def build_dataset(config: Config, folders: Sequence[str], **extra: Any) -> ConcatDataset:
    """The dataset of the `data` section, once for each folder, joined.

    Args:
        extra: further params of the dataset of clips; others decide for themselves.

    Raises:
        UserError: the data in a folder is wrong.
    """
    from torch.utils.data import ConcatDataset

    from sgm.util import instantiate_from_config

    if not config.data:
        raise UserError("the configuration has no section 'data'; add one with a target")
    if config.data.get("target") != VIDEO_DATASET:
        extra = {}
    parts = []
    for name in folders:
        parts.append(
            instantiate_from_config(config.data, data_dir=str(Path(name).expanduser()), **extra)
        )
    return ConcatDataset(parts)


def num_workers(config: Config) -> int:
    """Worker processes of a loader: no more than this machine has cores."""
    return min(config.args.num_workers, os.cpu_count() or 1)


def build_loader(dataset: Any, config: Config, *, batch_size: int, start: int) -> DataLoader:
    """This process's batches, for ever, from sample `start` of the run on."""
    import torch
    from torch import distributed
    from torch.utils.data import DataLoader

    from sgm.data.loader import SampleOrder, SeededDataset, collate

    order = SampleOrder(
        len(dataset),
        batch_size,
        seed=config.args.seed,
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        start=start,
    )
    return DataLoader(
        SeededDataset(dataset),
        batch_sampler=order,
        num_workers=num_workers(config),
        collate_fn=collate,
        pin_memory=torch.cuda.is_available() and config.args.device != "cpu",
    )


def compile_pays(config: Config, device: torch.device) -> bool:
    """Whether compiling saves more than the half minute it takes: a fifth of each step, on GPUs."""
    divided = (config.deepspeed.get("zero_optimization") or {}).get("stage") == 3
    is_long = config.args.train_iters >= COMPILE_STEPS
    return device.type == "cuda" and is_long and not divided and can_compile_kernels()


def set_up_activations(engine: SATVideoDiffusionEngine, config: Config) -> None:
    """Checkpointing of activations, and compiled blocks, as `args` ask for them."""
    args = config.args
    network = engine.model.diffusion_model
    if not args.checkpoint_activations:  # it takes this one and transformer_args' to be on
        network.set_checkpointing(None)
    elif network.checkpointing is not None:
        network.set_checkpointing(args.checkpoint_keep)
    if compile_pays(config, engine.device) if args.compile is None else args.compile:
        network.compile_blocks(tune=True)


def check(config: Config) -> RunWeights:
    """All that can be found wrong without PyTorch; returns the weights that were found.

    Raises:
        UserError: a value or a path is wrong.
    """
    warn_of_warmup(config.args)
    check_video_data(config.data, config.model)
    check_deepspeed(config.deepspeed)
    check_precision(config.args, config.deepspeed)
    from_nothing = config.args.mode == "pretrain"
    if not (config.args.load or from_nothing):
        raise UserError(
            "args.load is not set: it must name the folder of the transformer's weights; "
            "use mode: pretrain to start from random ones"
        )
    weights = find_weights(config.model, config.args.load, random_transformer=from_nothing)
    check_data_paths(config.args)
    return weights


def prompts_of(config: Config, valid: ConcatDataset | None) -> list[str]:
    """The prompts that validation makes videos of."""
    args = config.args
    if args.valid_prompts or valid is None:
        return args.valid_prompts
    captions = [text for part in valid.datasets for text in getattr(part, "captions", [])]
    return captions[: args.valid_videos]


def fill_cache(
    config: Config,
    parts: Sequence[ConcatDataset | None],
    *,
    prompts: Sequence[str],
    model: Mapping[str, Any],
    device: torch.device,
) -> Cache:
    """The cache in `cache_dir`, with all that the datasets and prompts need in it."""
    from sgm.data.cache import prepare_cache
    from sgm.training.preflight import weight_dtype

    return prepare_cache(
        [dataset for part in parts if part for dataset in part.datasets],
        model,
        cache_dir=config.args.cache_dir,
        texts=prompts,
        device=device,
        text_device=text_device(config, device),
        dtype=weight_dtype(config.deepspeed),
        num_workers=num_workers(config),
    )


class Data(NamedTuple):
    """What a run trains on and is validated on; the cache if the data come from one."""

    training: Dataset
    validation: Dataset | None
    prompts: Sequence[str]
    cache: Cache | None


def load_data(config: Config, device: torch.device, weights: RunWeights) -> Data:
    """The data of `args`, from the cache in `cache_dir` if that is given.

    Raises:
        UserError: a folder or its data is wrong, or the cache cannot be filled.
    """
    from sgm.data.loader import check_lengths

    args = config.args
    training = build_dataset(config, args.train_data)
    key = "train_micro_batch_size_per_gpu"
    check_lengths(training.datasets, batch_size=config.deepspeed.get(key, 1), key=key)
    validation = None
    if args.valid_data:
        validation = build_dataset(config, args.valid_data, random_window=False)
        key = "eval_batch_size"
        check_lengths(validation.datasets, batch_size=args.eval_batch_size, key=key)
    prompts = prompts_of(config, validation)
    if not args.cache_dir:
        return Data(training, validation, prompts, None)
    if prompts and weights.autoencoder and not args.only_log_video_latents:
        weights.autoencoder.keep()  # every validation loads it
    model = weights.within(config.model)
    cache = fill_cache(config, [training, validation], prompts=prompts, model=model, device=device)
    kept = None if validation is None else cache.dataset(validation)
    return Data(cache.dataset(training), kept, prompts, cache)


def build_validation(
    config: Config, data: Data, engine: SATVideoDiffusionEngine, *, folder: Path, lockstep: bool
) -> Validation | None:
    """What validates a run in `folder`; None where there is nothing to validate on."""
    from sgm.training.validation import Validation

    if data.validation is None and not data.prompts:
        return None
    return Validation(
        data.validation,
        config,
        folder=folder,
        prompts=data.prompts,
        embed=data.cache.embed if data.cache else engine.conditioner.encode,
        lockstep=lockstep,
    )


def start_average(wrapped: Any, args: TrainingArgs) -> WeightAverage | None:
    """The moving average of what DeepSpeed's engine trains, if `args` ask for one."""
    from sgm.distributed import is_main
    from sgm.training.checkpoint import trained_weights
    from sgm.training.ema import WeightAverage

    if not args.ema_decay:
        return None
    weights = trained_weights(wrapped.module)
    return WeightAverage(wrapped, weights, decay=args.ema_decay, keeps=is_main())


def train(config: Config, device: torch.device, weights: RunWeights) -> None:
    """Load everything, then train; all processes of the run call it alike.

    Raises:
        UserError: data, weights or settings are wrong, or a file cannot be written.
    """
    import torch
    from torch import distributed

    from sgm.data.loader import checked_batches
    from sgm.files import make_output_folder
    from sgm.training import run_folder
    from sgm.training.checkpoint import Checkpointer, Progress, trains_lora
    from sgm.training.deepspeed_engine import start_deepspeed
    from sgm.training.loop import Trainer, TrainingObjective
    from sgm.training.report import Report

    args = config.args
    torch.manual_seed(args.seed)  # of random weights, LoRA's among them
    checkpoint = run_folder.find_checkpoint(args) if args.resume else None
    if checkpoint:
        lock = run_folder.reserve(checkpoint.parent)
        logger.info("going on from %s", checkpoint)
        run_folder.compare_with_last_start(config, checkpoint.parent)
        if run_folder.is_main():
            run_folder.warn_of_what_stays(checkpoint, averages=args.ema_decay > 0)
    else:  # of which a fault is to be told before anything is read
        make_output_folder(Path(args.save).expanduser())
    engine, load_weights = build_engine(config, weights, checkpoint=checkpoint)
    data = load_data(config, device, weights)
    load_weights(device)
    set_up_activations(engine, config)
    wrapped = start_deepspeed(TrainingObjective(engine), config.deepspeed, args)
    if checkpoint:
        run = checkpoint.parent
    else:
        run = run_folder.start_run(args)
        lock = run_folder.reserve(run)
    batch_size = wrapped.train_micro_batch_size_per_gpu()
    lockstep = wrapped.zero_optimization_stage() == 3
    average = start_average(wrapped, args)
    report = Report(
        args,
        folder=run,
        start_step=int(checkpoint.name) if checkpoint else 0,
        total_steps=args.train_iters,
        samples_per_step=wrapped.train_batch_size(),
        is_main=run_folder.is_main(),
    )
    checkpointer = Checkpointer(
        wrapped,
        run,
        average=average,
        watched={"report": report},
        limit=args.save_total_limit,
        base=engine.base_fingerprint,
    )
    progress = checkpointer.restore(checkpoint) if checkpoint else Progress()
    if run_folder.is_main():
        run_folder.save_config(config, run)
    distributed.barrier()
    loader = build_loader(data.training, config, batch_size=batch_size, start=progress.samples)
    trainer = Trainer(
        wrapped,
        engine,
        args,
        batch_size=batch_size,
        checkpointer=checkpointer,
        report=report,
        validation=build_validation(config, data, engine, folder=run, lockstep=lockstep),
        average=average,
    )
    trainer.run(checked_batches(loader), progress)
    report.close()
    if lock is not None:
        lock.close()
    flag = "--lora" if trains_lora(wrapped.module) else "--load"
    logger.info("to sample: bash inference.sh CONFIG.yaml %s %s", flag, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, load, train; returns the exit code."""
    config = parse_config(TrainingArgs, "Train the transformer.", argv)
    set_up_logging()
    weights = check(config)

    import torch

    from sgm.distributed import Rank
    from sgm.loading import choose_device
    from sgm.modules.transformer.attention import check_attention
    from sgm.util import allow_targets

    allow_targets(config.allow_target)
    device = choose_device(config.args, Rank.from_environment())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # DeepSpeed, which is imported after this, would move the model to a GPU that is there.
        os.environ["DS_ACCELERATOR"] = "cpu"
    from sgm.sat_runtime import ensure_process_groups, leave_process_groups_at_exit
    from sgm.training.preflight import check_sections, weight_dtype

    ensure_process_groups()
    check_sections(config.deepspeed)
    dtype = weight_dtype(config.deepspeed)
    check_attention(config.args.attention, config.model, device=device, dtype=dtype)
    if config.args.compile:
        check_compile(device.type)
    train(config, device, weights)
    leave_process_groups_at_exit()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
