"""Train the transformer: ``python train_video.py --base config.yaml [--flags]``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from arguments import parse_config
from sgm.cli import run_and_exit, set_up_logging
from sgm.config import Config, TrainingArgs
from sgm.errors import UserError
from sgm.preflight import RunWeights, find_weights
from sgm.toolchain import can_compile_kernels, check_compile
from sgm.training.preflight import VIDEO_DATASET, check_data_paths, check_video_data

if TYPE_CHECKING:
    import torch
    from torch.utils.data import ConcatDataset, DataLoader, Dataset

    from sgm.data.cache import Cache
    from sgm.engine import SATVideoDiffusionEngine

# Heavy modules are imported only after the configuration has been checked, like in sample_video.py.

logger = logging.getLogger(__name__)

COMPILE_STEPS = 300  # on a GPU, runs of at least this many steps are compiled


def text_device(config: Config, device: torch.device) -> str | torch.device:
    """Return the text encoder's device: the CPU if `text_device` is cpu, otherwise `device`."""
    return "cpu" if config.args.text_device == "cpu" else device


def build_engine(
    config: Config, weights: RunWeights, *, checkpoint: Path | None = None
) -> tuple[SATVideoDiffusionEngine, Callable[[torch.device], None]]:
    """Build the engine in training mode on the device "meta" and compare it with the weight files.

    Args:
        config: the configuration.
        weights: the weight files of the configuration. In mode pretrain, the transformer starts
            with random weights, and its files are not used.
        checkpoint: the folder of the iteration to resume from. A whole model in it replaces the
            weights of `load`; a LoRA in it is added to the weights of `load`.

    Returns:
        The engine, and a function that loads its weights on a device.

    Raises:
        UserError: the configuration or a weight file is invalid, or a file is missing in
            `checkpoint`.
    """
    from sgm.checkpoint.find import find_transformer
    from sgm.checkpoint.lora import check_trained_lora, load_lora
    from sgm.data.cache_keys import check_cacheable
    from sgm.engine import SATVideoDiffusionEngine
    from sgm.training import checkpoint as saving
    from sgm.training.deepspeed_settings import weight_dtype
    from sgm.util import check_params

    args = config.args
    saved = None if checkpoint is None else find_transformer(checkpoint, option="resume")
    is_lora = saved is not None and saving.holds_lora(saved)
    load = weights.transformer if saved is None or is_lora else saved
    extra = {"load": load, "device": "meta", "dtype": weight_dtype(config.deepspeed)}
    extra["cached_input"] = bool(args.cache_dir)
    params = check_params(
        SATVideoDiffusionEngine, weights.within(config.model) | extra, where=config.place("model")
    )
    if not params.get("loss_fn_config"):
        raise UserError(f"{config.place('model')}: loss_fn_config is missing; training needs it")
    engine = SATVideoDiffusionEngine(**params).train()
    engine.check_trained()
    if args.cache_dir:
        check_cacheable(config.model["conditioner_config"])
    network = engine.model.diffusion_model
    stored = {}
    if checkpoint is not None:
        if network.lora_config and not is_lora:
            raise UserError(
                f"{checkpoint} holds a whole model, but the configuration trains a LoRA; to train "
                f"a LoRA on this model, start a new run with --load {checkpoint}"
            )
        if is_lora:
            check_trained_lora(network, saved)
        else:
            stored = saving.check_conditioner(engine, saved)
        saving.check_state_file(checkpoint / saving.STATE_FILE)

    def load_weights(device: torch.device) -> None:
        engine.load_weights(device, text_device=text_device(config, device))
        network.set_attention(args.attention)
        if is_lora:
            load_lora(network, saved, base=engine.base_fingerprint)
            saved.release()
        engine.load_state_dict(stored, strict=False)
        stored.clear()

    return engine, load_weights


def build_dataset(config: Config, folders: Sequence[str], **extra: object) -> ConcatDataset:
    """Build the dataset of the `data` section for each folder, and concatenate the datasets.

    Args:
        config: the configuration.
        folders: the data folders, each a value of `data_dir`.
        extra: further params of the dataset; ignored if it is not `data_video.SFTDataset`.

    Raises:
        UserError: the section is missing, or the data in a folder is invalid.
    """
    from torch.utils.data import ConcatDataset

    from sgm.files import expanded
    from sgm.util import instantiate_from_config

    if config.data.get("target") != VIDEO_DATASET:
        extra = {}
    paths = [str(expanded(name)) for name in folders]
    return ConcatDataset(
        [instantiate_from_config(config.data, data_dir=path, **extra) for path in paths]
    )


def num_workers(config: Config) -> int:
    """Return the number of worker processes per loader; at most the number of cores."""
    return min(config.args.num_workers, os.cpu_count() or 1)


def build_loader(dataset: Dataset, config: Config, *, batch_size: int, start: int) -> DataLoader:
    """Return an endless loader of this process's batches; `start` counts samples already used."""
    import torch
    from torch import distributed
    from torch.utils.data import DataLoader

    from sgm.data.loader import SeededDataset, sample_order

    order = sample_order(
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
        pin_memory=torch.cuda.is_available() and config.args.device != "cpu",
    )


def set_up_activations(engine: SATVideoDiffusionEngine, config: Config) -> None:
    """Set up activation checkpointing and compile the transformer blocks, as `args` require.

    If `compile` is not set, the blocks are compiled only if this saves time. On a GPU, compiling
    takes half a minute and makes each step a fifth shorter.
    """
    args = config.args
    network = engine.model.diffusion_model
    # Checkpointing is used only if both this flag and transformer_args enable it.
    if not args.checkpoint_activations:
        network.set_checkpointing(None)
    elif network.checkpointing is not None:
        network.set_checkpointing(args.checkpoint_keep)
    compiles = args.compile
    if compiles is None:
        divided = (config.deepspeed.get("zero_optimization") or {}).get("stage") == 3
        is_long = args.train_iters >= COMPILE_STEPS
        on_gpu = engine.device.type == "cuda"
        compiles = on_gpu and is_long and not divided and can_compile_kernels()
    if compiles:
        network.compile_blocks(tune=True)


def check(config: Config) -> RunWeights:
    """Check everything that can be checked without PyTorch, and return the weight files.

    Raises:
        UserError: a value or a path is invalid.
    """
    check_video_data(config.data, config.model)
    from_nothing = config.args.mode == "pretrain"
    weights = find_weights(config.model, config.args.load, random_transformer=from_nothing)
    check_data_paths(config.args)
    return weights


class TrainingData(NamedTuple):
    """The datasets, the prompts of the validation videos, and the cache (None if not used)."""

    training: Dataset
    validation: Dataset | None
    prompts: Sequence[str]
    cache: Cache | None


def load_data(config: Config, device: torch.device, weights: RunWeights) -> TrainingData:
    """Load the training and validation data; if `cache_dir` is set, fill the cache and use it.

    Raises:
        UserError: a folder or its data is invalid, or the cache cannot be filled.
    """
    from sgm.data.cache import prepare_cache
    from sgm.data.loader import check_lengths
    from sgm.training.deepspeed_settings import weight_dtype

    args = config.args
    training = build_dataset(config, args.train_data)
    key = "train_micro_batch_size_per_gpu"
    check_lengths(training.datasets, batch_size=config.deepspeed.get(key, 1), key=key)
    validation, prompts = None, args.valid_prompts
    if args.valid_data:
        validation = build_dataset(config, args.valid_data, random_window=False)
        parts, key = validation.datasets, "eval_batch_size"
        check_lengths(parts, batch_size=args.eval_batch_size, key=key)
        captions = [text for part in parts for text in getattr(part, "captions", [])]
        prompts = prompts or captions[: args.valid_videos]
    if not args.cache_dir:
        return TrainingData(training, validation, prompts, None)
    if prompts and weights.autoencoder and not args.only_log_video_latents:
        weights.autoencoder.keep()  # each validation loads the autoencoder again
    cache = prepare_cache(
        [*training.datasets, *(validation.datasets if validation else [])],
        weights.within(config.model),
        cache_dir=args.cache_dir,
        texts=prompts,
        device=device,
        text_device=text_device(config, device),
        dtype=weight_dtype(config.deepspeed),
        num_workers=num_workers(config),
    )
    cached = cache.dataset(validation) if validation else None
    return TrainingData(cache.dataset(training), cached, prompts, cache)


def train(config: Config, device: torch.device, weights: RunWeights) -> None:
    """Load the model and the data, then train; every process of the run must call this.

    Raises:
        UserError: data, weights or settings are invalid, or a file cannot be written.
    """
    import torch
    from torch import distributed

    from sgm.data.loader import checked_batches
    from sgm.distributed import is_main
    from sgm.files import expanded, make_output_folder
    from sgm.training import run_folder
    from sgm.training.checkpoint import trains_lora
    from sgm.training.deepspeed_engine import start_deepspeed
    from sgm.training.loop import Trainer, TrainingObjective
    from sgm.training.validation import Validation

    args = config.args
    torch.manual_seed(args.seed)  # for random weights, such as LoRA's
    checkpoint = run_folder.find_checkpoint(args) if args.resume else None
    if checkpoint:
        lock = run_folder.reserve(checkpoint.parent)
        logger.info("resuming from %s", checkpoint)
        run_folder.compare_with_last_start(config, checkpoint.parent)
    else:  # if the folder cannot be written to, fail before reading any weights or data
        make_output_folder(expanded(args.save))
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
    validation = Validation(
        data.validation,
        config,
        folder=run,
        prompts=data.prompts,
        embed=data.cache.embed if data.cache else engine.conditioner.encode,
        lockstep=wrapped.zero_optimization_stage() == 3,
    )
    trainer = Trainer(wrapped, engine, args, run=run, checkpoint=checkpoint, validation=validation)
    if is_main():
        run_folder.save_config(config, run)
        if checkpoint and trainer.progress.step < args.train_iters:
            run_folder.set_aside_later(checkpoint)
    distributed.barrier()
    loader = build_loader(
        data.training, config, batch_size=trainer.batch_size, start=trainer.progress.samples
    )
    trainer.run(checked_batches(loader))
    if lock is not None:
        lock.close()
    flag = "--lora" if trains_lora(wrapped.module) else "--load"
    logger.info("to sample: bash inference.sh CONFIG.yaml %s %s", flag, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, load and train; return the exit code."""
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
        # Otherwise DeepSpeed, which is imported later, moves the model to a GPU if one exists.
        os.environ["DS_ACCELERATOR"] = "cpu"
    from sgm.sat_runtime import ensure_process_groups, leave_process_groups_at_exit
    from sgm.training.deepspeed_settings import check_deepspeed, check_precision, weight_dtype

    ensure_process_groups()
    check_deepspeed(config.deepspeed)
    check_precision(config.args, config.deepspeed)
    dtype = weight_dtype(config.deepspeed)
    check_attention(config.args.attention, config.model, device=device, dtype=dtype)
    if config.args.compile:
        check_compile(device.type)
    train(config, device, weights)
    leave_process_groups_at_exit()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
